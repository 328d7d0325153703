package unit

import "fmt"

// Desired is what somebody wants of a unit.
type Desired string

// In this order: each is more than the one before.
const (
	Inactive Desired = "inactive" // known to the cluster, on no node
	Loaded   Desired = "loaded"   // on a node and known to its systemd, not started
	Launched Desired = "launched" // started once; systemd's Restart= does the rest
)

// ParseDesired reads a desired state. The error lists the three.
func ParseDesired(s string) (Desired, error) {
	switch d := Desired(s); d {
	case Inactive, Loaded, Launched:
		return d, nil
	}
	return "", fmt.Errorf("invalid desired state %q: must be %s, %s or %s", s, Inactive, Loaded, Launched)
}
