package state

import (
	"cmp"
	"fmt"
	"slices"

	"flotilla/internal/unit"
)

// Claim is one unit that is, or may be, on a node.
type Claim struct {
	Name         string
	Requirements *unit.Requirements
	Epoch        int64 // of its Placement; for a global unit the create revision of its record
}

// GlobalsOn says which global units run on a node and, for the others, why
// they do not. Engine and agents have to come to the same result, from what
// each of them knows: the node's ID and merged metadata, the units placed on
// it, and all global units that shall be loaded or launched. Of two units in
// conflict the one with the lower epoch has the node: nobody is evicted by
// who came later.
func GlobalsOn(id string, metadata map[string]string, placed, globals []Claim) (run []string, refused map[string]string) {
	order := slices.SortedFunc(slices.Values(globals), func(a, b Claim) int {
		return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Name, b.Name))
	})
	refused = map[string]string{}
	var running []Claim
	for _, g := range order {
		if why := g.Requirements.Mismatch(id, metadata); why != "" {
			refused[g.Name] = why
			continue
		}
		if why := conflict(g, running); why != "" {
			refused[g.Name] = why
			continue
		}
		if why := conflict(g, placed); why != "" {
			refused[g.Name] = why
			continue
		}
		running = append(running, g)
		run = append(run, g.Name)
	}
	return run, refused
}

// conflict returns why g cannot be beside those of others that came before it.
func conflict(g Claim, others []Claim) string {
	for _, o := range others {
		if o.Epoch <= g.Epoch && Conflict(g, o) {
			return fmt.Sprintf("it conflicts with %s, which was there first", o.Name)
		}
	}
	return ""
}

// Conflict reports whether one of two units does not want to be on the same
// node as the other.
func Conflict(a, b Claim) bool {
	if a.Name == b.Name {
		return false
	}
	if _, ok := a.Requirements.ConflictsWith(b.Name); ok {
		return true
	}
	_, ok := b.Requirements.ConflictsWith(a.Name)
	return ok
}
