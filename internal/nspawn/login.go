package nspawn

import "path/filepath"

// Login returns what an ssh client needs: the file of a private key that every
// machine of the cluster takes for root and core, and a known_hosts file that
// has the machines under their names.
func (c *Cluster) Login() (identity, knownHosts string) {
	return c.key(), filepath.Join(c.dir(), "known_hosts")
}
