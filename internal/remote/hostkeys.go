package remote

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"flotilla/internal/text"
)

// ErrHostKey: the far side is not, or may not be, the machine that it should be.
// Test with errors.Is.
var ErrHostKey = errors.New("the host key is not accepted")

// HostKeys says which host keys are accepted.
type HostKeys struct {
	// Files are in the form of known_hosts and are read in this order; one that
	// is missing is empty. Accepted keys are written to the first.
	Files []string
	// Ask lets a person decide about a machine that is in no file; nil: it is
	// refused.
	Ask func(question string) (yes bool, err error)
	// Alias is the name under which the machine is in the files; "": its address.
	Alias string
	// Insecure accepts every key and remembers none.
	Insecure bool
}

// hostKeyCheck is the check of one connection. It is used by one goroutine at a
// time.
type hostKeyCheck struct {
	HostKeys
	address string        // host:port
	patient func() func() // pauses the time limit until the returned function is called

	accepted []byte // the key that was accepted
	refused  error
}

// check is an ssh.HostKeyCallback. It is called again when keys are exchanged
// anew.
func (h *hostKeyCheck) check(_ string, remote net.Addr, key ssh.PublicKey) error {
	if h.Insecure || h.accepted != nil && bytes.Equal(h.accepted, key.Marshal()) {
		return nil
	}
	if h.refused = h.decide(remote, key); h.refused == nil {
		h.accepted = key.Marshal()
	}
	return h.refused
}

func (h *hostKeyCheck) decide(remote net.Addr, key ssh.PublicKey) error {
	callback, err := h.load()
	if err != nil {
		return err
	}
	err = callback(h.address, remote, key)
	var unknown *knownhosts.KeyError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &unknown):
		return &Error{fmt.Errorf("%w: %v", ErrHostKey, err), ""}
	case len(unknown.Want) > 0:
		return h.changed(key, unknown.Want)
	}
	return h.ask(key)
}

// load reads the files anew: another process may have added a key.
func (h *hostKeyCheck) load() (ssh.HostKeyCallback, error) {
	var there []string
	for _, file := range h.Files {
		if _, err := os.Stat(file); err == nil {
			there = append(there, file)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read known hosts: %w", err)
		}
	}
	callback, err := knownhosts.New(there...)
	if err != nil {
		return nil, fmt.Errorf("read known hosts: %w", err)
	}
	return callback, nil
}

func (h *hostKeyCheck) changed(key ssh.PublicKey, want []knownhosts.KnownKey) error {
	known := want[0]
	for _, k := range want {
		if k.Key.Type() == key.Type() {
			known = k
		}
	}
	return &Error{
		fmt.Errorf("%w: %s shows %s, but %s line %d has %s: the machine was replaced, or somebody stands in between",
			ErrHostKey, h.address, fingerprint(key), known.Filename, known.Line, fingerprint(known.Key)),
		fmt.Sprintf("if the machine was replaced, forget its old key: ssh-keygen -f %s -R '%s'", text.ShellQuote(known.Filename), knownhosts.Normalize(h.address)),
	}
}

func (h *hostKeyCheck) ask(key ssh.PublicKey) error {
	if h.Ask == nil || len(h.Files) == 0 {
		return &Error{fmt.Errorf("%w: %s is not known and shows %s", ErrHostKey, h.address, fingerprint(key)), "log in there once by hand, and compare the fingerprint"}
	}
	defer h.patient()()
	yes, err := h.Ask(fmt.Sprintf("The host %s is not known yet. Its key is %s.\nGo on and remember it (yes/no)? ", h.address, fingerprint(key)))
	if err != nil {
		return fmt.Errorf("ask about the host key of %s: %w", h.address, err)
	}
	if !yes {
		return &Error{fmt.Errorf("%w: %s is not known, and its key %s was not accepted", ErrHostKey, h.address, fingerprint(key)), ""}
	}
	return remember(h.Files[0], knownhosts.Line([]string{h.address}, key))
}

// remember adds a line to a file, which is made if it is missing.
func remember(file, line string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("remember the host key: %w", err)
		}
	}()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	line += "\n"
	if size, err := f.Seek(0, io.SeekEnd); err == nil && size > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, size-1); err == nil && last[0] != '\n' {
			line = "\n" + line
		}
	}
	_, err = f.WriteString(line)
	return err
}

// fingerprint returns "ED25519 SHA256:...".
func fingerprint(key ssh.PublicKey) string {
	kind := strings.TrimPrefix(strings.TrimPrefix(key.Type(), "ssh-"), "ecdsa-sha2-")
	return strings.ToUpper(kind) + " " + ssh.FingerprintSHA256(key)
}

// algorithms returns the kinds of host keys in the order in which the server is
// to choose: first those of which the files know a key. A server has several
// keys, and one that is not in the files would look like another machine's.
func (h *hostKeyCheck) algorithms() ([]string, error) {
	all := ssh.SupportedAlgorithms().HostKeys
	if h.Insecure {
		return all, nil
	}
	callback, err := h.load()
	if err != nil {
		return nil, err
	}
	var unknown *knownhosts.KeyError
	if err := callback(h.address, &net.TCPAddr{IP: net.IPv4zero}, noKey{}); !errors.As(err, &unknown) {
		return all, nil
	}
	var first []string
	for _, k := range unknown.Want {
		if kind := k.Key.Type(); kind == ssh.KeyAlgoRSA {
			first = append(first, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256)
		} else {
			first = append(first, kind)
		}
	}
	rest := slices.DeleteFunc(all, func(a string) bool { return slices.Contains(first, a) })
	return append(first, rest...), nil
}

// noKey is a key that no machine has: looking it up tells which keys are known.
type noKey struct{}

func (noKey) Type() string                        { return "none" }
func (noKey) Marshal() []byte                     { return []byte("none") }
func (noKey) Verify([]byte, *ssh.Signature) error { return ErrHostKey }
