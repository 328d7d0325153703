package remote

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// DefaultIdentities returns where the keys of the user with that home directory
// usually lie.
func DefaultIdentities(home string) []string {
	var files []string
	for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
		files = append(files, filepath.Join(home, ".ssh", name))
	}
	return files
}

// keys finds the keys to log in with. It is used by one goroutine.
type keys struct {
	options Options
	patient func() func() // pauses the time limit until the returned function is called
	agent   net.Conn      // nil while there is none

	failed error    // a named key that could not be read
	offers []string // where keys came from
	locked []string // encrypted key files that were left out
	silent error    // why the agent does not answer
}

// signers returns every key, those named by the user first: a server allows only
// a few attempts.
func (k *keys) signers() ([]ssh.Signer, error) {
	var all []ssh.Signer
	for _, file := range k.options.Identities {
		s, err := k.fromFile(file)
		if err != nil {
			k.failed = err
			return nil, err
		}
		all = append(all, s...)
	}
	all = append(all, k.fromAgent()...)
	for _, file := range k.options.Defaults {
		if s, err := k.fromFile(file); err == nil { // a default that is missing or unreadable is no error
			all = append(all, s...)
		}
	}
	return all, nil
}

func (k *keys) fromAgent() []ssh.Signer {
	if k.options.Agent == "" {
		return nil
	}
	conn, err := net.Dial("unix", k.options.Agent)
	if err != nil {
		k.silent = err
		return nil
	}
	k.agent = conn // signing asks it later
	s, err := agent.NewClient(conn).Signers()
	if err != nil {
		k.silent = err
		return nil
	}
	k.offers = append(k.offers, fmt.Sprintf("the agent's %d", len(s)))
	return s
}

// fromFile reads a private key, and the certificate beside it if there is one.
func (k *keys) fromFile(file string) ([]ssh.Signer, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the ssh key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(raw)
	var encrypted *ssh.PassphraseMissingError
	if errors.As(err, &encrypted) {
		if k.options.Passphrase == nil {
			k.locked = append(k.locked, file)
			return nil, nil
		}
		signer, err = k.unlock(file, raw)
	}
	if err != nil {
		return nil, fmt.Errorf("read the ssh key %s: %w", file, err)
	}
	k.offers = append(k.offers, file)
	if cert := certificate(file+"-cert.pub", signer); cert != nil {
		return []ssh.Signer{cert, signer}, nil
	}
	return []ssh.Signer{signer}, nil
}

func (k *keys) unlock(file string, raw []byte) (ssh.Signer, error) {
	defer k.patient()()
	phrase, err := k.options.Passphrase(file)
	if err != nil {
		return nil, err
	}
	return ssh.ParsePrivateKeyWithPassphrase(raw, []byte(phrase))
}

// certificate returns nil if the file is not a certificate of the key.
func certificate(file string, key ssh.Signer) ssh.Signer {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey(raw)
	if err != nil {
		return nil
	}
	cert, ok := public.(*ssh.Certificate)
	if !ok {
		return nil
	}
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		return nil
	}
	return signer
}

// tried says which keys were offered, in parentheses.
func (k *keys) tried() string {
	switch {
	case len(k.offers) > 0:
		return " (offered: " + strings.Join(k.offers, ", ") + ")"
	case len(k.locked) > 0:
		return " (" + strings.Join(k.locked, ", ") + " has a passphrase, which cannot be asked for here)"
	case k.silent != nil:
		return fmt.Sprintf(" (the ssh-agent does not answer: %v)", k.silent)
	}
	return " (there is none)"
}

func (k *keys) hint() string {
	switch {
	case len(k.offers) > 0:
		return "name the right user (user@host) or the right key, or add the key to the agent with ssh-add"
	case k.silent != nil && errors.Is(k.silent, fs.ErrNotExist):
		return "SSH_AUTH_SOCK names a socket that is gone: start ssh-agent again, or name a key file"
	}
	return "start ssh-agent and add a key with ssh-add, or name a key file"
}

func (k *keys) close() {
	if k.agent != nil {
		_ = k.agent.Close() // nothing was left to write
	}
}
