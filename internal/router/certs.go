package router

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"flotilla/internal/catalog"
)

// certificates keeps the certificates that HAProxy serves equal to those in the
// operator's directory. Each is checked before it gets near HAProxy; a bad file
// leaves the last good certificate of that name in force.
type certificates struct {
	loaded   map[string][]byte // PEM of chain and key by name, as HAProxy has it
	problems []catalog.Problem
	next     time.Time // of the next look
}

const (
	certificateEvery   = 2 * time.Second
	defaultCertificate = "flotilla-default" // served when no other fits the server name
)

func (r *Router) certFile(name string) string {
	return filepath.Join(r.cfg.Dir, "certs", name+".pem")
}

func (r *Router) crtList() string { return filepath.Join(r.cfg.Dir, "certs", "crt-list") }

// prepareCertificates returns the files of certificates for an HAProxy that starts.
func (r *Router) prepareCertificates() ([]file, error) {
	r.certs.loaded = map[string][]byte{}
	fallback, err := os.ReadFile(r.certFile(defaultCertificate))
	if err != nil {
		if fallback, err = selfSigned(r.cfg.Node); err != nil {
			return nil, err
		}
	}
	// What HAProxy may be running is what was written last.
	old, err := filepath.Glob(filepath.Join(r.cfg.Dir, "certs", "*.pem"))
	if err != nil {
		return nil, fmt.Errorf("certificates: %w", err)
	}
	for _, path := range old {
		if text, err := os.ReadFile(path); err == nil {
			r.certs.loaded[strings.TrimSuffix(filepath.Base(path), ".pem")] = text
		}
	}
	r.certs.loaded[defaultCertificate] = fallback
	files := []file{{path: r.certFile(defaultCertificate), text: fallback}}
	if r.client.Alive() { // changes go through the Runtime API
		return files, nil
	}
	found, problems := readCertificates(r.cfg.Certs, r.certs.loaded)
	r.certs.problems = problems
	for name, text := range found {
		files = append(files, file{path: r.certFile(name), text: text})
	}
	found[defaultCertificate] = fallback
	r.certs.loaded = found
	return append(files, r.crtListFile()), nil
}

func (r *Router) crtListFile() file {
	lines := r.certFile(defaultCertificate) + "\n" // the first is the one for unknown names
	for _, name := range slices.Sorted(maps.Keys(r.certs.loaded)) {
		if name != defaultCertificate {
			lines += r.certFile(name) + "\n"
		}
	}
	return file{path: r.crtList(), text: []byte(lines)}
}

// updateCertificates brings changes of the directory to HAProxy.
func (r *Router) updateCertificates(ctx context.Context, now time.Time) error {
	if r.cfg.Certs == "" || now.Before(r.certs.next) {
		return nil
	}
	r.certs.next = now.Add(certificateEvery)
	found, problems := readCertificates(r.cfg.Certs, r.certs.loaded)
	r.certs.problems = problems
	found[defaultCertificate] = r.certs.loaded[defaultCertificate]
	for name, text := range found {
		if bytes.Equal(text, r.certs.loaded[name]) {
			continue
		}
		if err := r.disk.write(ctx, file{path: r.certFile(name), text: text}); err != nil {
			return err
		}
		if err := r.loadCertificate(ctx, name, text, r.certs.loaded[name] == nil); err != nil {
			r.reload.ask(now, "certificate "+name+" could not be changed at run time")
			r.log.Warn("certificate", "name", name, "err", err)
		} else {
			r.log.Info("certificate is served", "name", name)
		}
		r.certs.loaded[name] = text
		if err := r.disk.write(ctx, r.crtListFile()); err != nil {
			return err
		}
	}
	for name := range r.certs.loaded {
		if found[name] != nil {
			continue
		}
		path := r.certFile(name)
		answers, err := r.do(ctx, fmt.Sprintf("del ssl crt-list %s %s", r.crtList(), path), "del ssl cert "+path)
		if err != nil {
			return err
		}
		if err := errors.Join(answers[0].Err(), answers[1].Err()); err != nil {
			r.log.Warn("certificate", "name", name, "err", err)
		}
		delete(r.certs.loaded, name)
		if err := r.disk.write(ctx, r.crtListFile(), file{path: path, remove: true}); err != nil {
			return fmt.Errorf("certificate %s: %w", name, err)
		}
		r.log.Info("certificate is no longer served", "name", name)
	}
	return nil
}

func (r *Router) loadCertificate(ctx context.Context, name string, text []byte, isNew bool) error {
	path := r.certFile(name)
	if isNew {
		if err := r.client.Payload(ctx, "new ssl cert "+path, ""); err != nil {
			return err
		}
	}
	if err := r.client.Payload(ctx, "set ssl cert "+path, string(text)); err != nil {
		return err
	}
	commands := []string{"commit ssl cert " + path}
	if isNew {
		commands = append(commands, fmt.Sprintf("add ssl crt-list %s %s", r.crtList(), path))
	}
	answers, err := r.do(ctx, commands...)
	if err != nil {
		return err
	}
	for i, a := range answers {
		if err := a.Err(); err != nil {
			return fmt.Errorf("%s: %w", commands[i], err)
		}
	}
	// "commit" says so only in words.
	if !strings.Contains(answers[0].Text, "Success") {
		return fmt.Errorf("%s: %s", commands[0], answers[0].Text)
	}
	return nil
}

// readCertificates reads NAME.pem (chain and key in one file) and NAME.crt with
// NAME.key. A file that cannot be used is a problem and its last good version
// stays.
func readCertificates(dir string, last map[string][]byte) (map[string][]byte, []catalog.Problem) {
	found := map[string][]byte{}
	var problems []catalog.Problem
	if dir == "" {
		return found, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		problems = append(problems, catalog.Problem{Key: dir, Reason: "the certificates cannot be read: " + err.Error(), Remedy: "create the directory or correct --certs"})
		for name, text := range last {
			found[name] = text
		}
		return found, problems
	}
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		name := strings.TrimSuffix(e.Name(), ext)
		if ext != ".pem" && ext != ".crt" || e.IsDir() {
			continue
		}
		text, err := readCertificate(filepath.Join(dir, name), ext)
		if err == nil && strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == ';' || r == '\\' || r == '"' || r == '\'' }) {
			err = errors.New("the file's name has characters that HAProxy cannot take")
		}
		if err == nil {
			found[name] = text
			continue
		}
		problems = append(problems, catalog.Problem{
			Key: filepath.Join(dir, e.Name()), Reason: err.Error(),
			Remedy: "put the chain (leaf first) and its private key into NAME.pem, or into NAME.crt and NAME.key",
		})
		if last[name] != nil {
			found[name] = last[name]
		}
	}
	return found, problems
}

func readCertificate(stem, ext string) ([]byte, error) {
	text, err := os.ReadFile(stem + ext)
	if err != nil {
		return nil, err
	}
	if ext == ".crt" {
		key, err := os.ReadFile(stem + ".key")
		if err != nil {
			return nil, err
		}
		text = append(append(text, '\n'), key...)
	}
	if _, err := tls.X509KeyPair(text, text); err != nil {
		return nil, err
	}
	// Only the blocks go on: a blank line would end the payload.
	var clean []byte
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return clean, nil
		}
		block.Headers = nil
		clean = append(clean, pem.EncodeToMemory(block)...)
	}
}

// selfSigned makes the certificate for names that no other fits, so that https
// services answer before the operator has brought certificates.
func selfSigned(node string) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("default certificate: %w", err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, fmt.Errorf("default certificate: %w", err)
	}
	now := time.Now()
	cert := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "flotilla default certificate of " + node},
		DNSNames:     []string{"flotilla.invalid"},
		NotBefore:    now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("default certificate: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("default certificate: %w", err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...), nil
}
