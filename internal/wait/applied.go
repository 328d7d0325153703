package wait

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"flotilla/internal/state"
	"flotilla/internal/text"
	"flotilla/internal/wire"
)

// Applied is how far the routers are with a revision of the catalog. Nodes without
// a report of a router are not waited for, nor those that refuse another service:
// it blocks nobody. A node that goes away is no longer waited for, one that comes
// is.
type Applied struct {
	Revision int64
	Service  string                 // whose revision it is; "": not known
	Began    time.Time              // of the wait; zero: nobody waits
	nodes    map[string]nodeApplied // by ID
}

type nodeApplied struct {
	wire.Applied
	refuses string // the service that keeps it from the revision
}

// See takes in what a snapshot says.
func (a *Applied) See(known *state.Snapshot) {
	before := a.nodes
	a.nodes = map[string]nodeApplied{}
	for id, n := range known.Nodes {
		if !n.Router.Exists() {
			continue
		}
		if a.nodes[id] = before[id]; before[id].Reached {
			continue
		}
		at := nodeApplied{Applied: wire.Applied{Node: n.Name(), Revision: n.Router.Value.Applied}}
		for service, revision := range n.Router.Value.Refused {
			if a.Service == service && revision <= a.Revision || a.Service == "" && revision == a.Revision {
				at.refuses = service
			}
		}
		if at.Reached = at.Revision >= a.Revision && at.refuses == ""; at.Reached && !a.Began.IsZero() {
			at.MS = float64(time.Since(a.Began).Microseconds()) / 1000
		}
		a.nodes[id] = at
	}
}

// Reached reports whether there are routers and all have applied the revision.
func (a *Applied) Reached() bool {
	for _, n := range a.nodes {
		if !n.Reached {
			return false
		}
	}
	return len(a.nodes) > 0
}

// List returns how far each node is.
func (a *Applied) List() []wire.Applied {
	list := make([]wire.Applied, 0, len(a.nodes))
	for _, n := range a.nodes {
		list = append(list, n.Applied)
	}
	slices.SortFunc(list, func(a, b wire.Applied) int { return strings.Compare(a.Node, b.Node) })
	return list
}

// Laggards returns "n2 is at 41, n3 refuses service web".
func (a *Applied) Laggards() string {
	var behind []string
	for _, n := range a.nodes {
		switch {
		case n.Reached:
		case n.refuses != "":
			behind = append(behind, fmt.Sprintf("%s refuses service %s", n.Node, text.Show(n.refuses)))
		default:
			behind = append(behind, fmt.Sprintf("%s is at %d", n.Node, n.Revision))
		}
	}
	if len(behind) == 0 {
		return "no node has reported"
	}
	slices.Sort(behind)
	return strings.Join(behind, ", ")
}

func (a *Applied) look(known *state.Snapshot, _ time.Time) (events []wire.WaitEvent, _ time.Time, done bool) {
	before := a.nodes
	a.See(known)
	for id, n := range a.nodes {
		if n.Reached && !before[id].Reached {
			events = append(events, wire.WaitEvent{Outcome: wire.WaitReached, Node: new(Ref(known, id)), Applied: new(n.Applied)})
		}
	}
	return events, time.Time{}, a.Reached()
}

func (a *Applied) late(known *state.Snapshot) (events []wire.WaitEvent, left int) {
	for id, n := range a.nodes {
		if !n.Reached {
			e := wire.WaitEvent{Outcome: wire.WaitLate, Node: new(Ref(known, id)), Applied: new(n.Applied)}
			if n.refuses != "" {
				e.Message = "it refuses service " + text.Show(n.refuses)
			}
			events = append(events, e)
		}
	}
	return events, len(events)
}
