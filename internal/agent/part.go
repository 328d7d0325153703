package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"reflect"
	"slices"

	"flotilla/internal/state"
	"flotilla/internal/systemd"
	"flotilla/internal/unit"
)

// maxText is how long a unit file may be, in bytes.
const maxText = 1 << 20

// part is what one snapshot wants of this node.
type part struct {
	of         *state.Snapshot
	generation int64 // of this node, 0 while it is not registered
	wants      map[string]*want
	waiting    map[string]state.UnitState // global units that are not here, and why
}

// want is what the cluster wants of one unit that is meant for this node.
type want struct {
	unit       *state.Unit // that it was made of
	generation int64       // of this node

	Hash      string       // of the unit file, as fleet computes it
	Text      string       // the unit file
	DropIn    string       // what is added to it; "" for nothing
	Sum       string       // of both
	Desired   unit.Desired //
	Restarts  int64        //
	Epoch     int64        //
	Release   string       // why it shall leave; "" if it may stay
	Void      string       // why nothing is loaded or started of it for now; "" if it is in force
	Outlived  bool         // it is void because it is of an older generation: the unit may be elsewhere
	Exclusive bool         // it runs behind the fence
	Problem   string       // why this version cannot be here at all
	IfHere    bool         // it may be meant for another node: it is left as it is, if it is here
	After     []string     // units that are started before it when both are to be started
	Before    []string     // units that are started after it
	Install   bool         // it has an [Install] section
}

// version says of which records something was made.
type version struct{ record, placement int64 }

func (w *want) version() version {
	if w == nil || w.unit == nil {
		return version{}
	}
	return version{w.unit.Record.Modified, w.unit.Placement.Modified}
}

// derive returns what a snapshot wants of this node, and how many units of it are
// not as in old, which is what an earlier snapshot wanted.
func (a *Agent) derive(s *state.Snapshot, old *part) (p *part, changed int) {
	self := s.Nodes[a.cfg.ID]
	switch {
	case old == nil || old.of == nil:
		old = &part{}
	case sameMap(old.of.Units, s.Units) && old.of.Nodes[a.cfg.ID] == self: // it is about other nodes
		return old, 0
	}
	p = &part{of: s, generation: a.cfg.Registration.GenerationIn(s), wants: map[string]*want{}, waiting: map[string]state.UnitState{}}
	add := func(u *state.Unit, ifHere bool) {
		w := old.wants[u.Name]
		if w == nil || w.unit != u || w.generation != p.generation || w.IfHere != ifHere {
			w = newWant(u, a.cfg.ID, p.generation, w)
			w.IfHere = ifHere
			changed++
		}
		p.wants[u.Name] = w
	}
	var placed, globals []state.Claim
	for _, u := range s.Units {
		switch {
		case u.Placement.Exists() && u.Placement.Value.Node == a.cfg.ID:
			placed = append(placed, state.Claim{Name: u.Name, Requirements: u.Requirements, Epoch: u.Placement.Value.Epoch})
			add(u, false)
		case u.Placement.Exists() && u.Placement.Value.Node != "":
		case u.Placement.Exists(): // nobody knows where it belongs
			add(u, true)
		case u.Requirements.Global && u.Wanted():
			globals = append(globals, state.Claim{Name: u.Name, Requirements: u.Requirements, Epoch: u.Record.Created})
		case u.Record.Exists() && (u.Record.Problem != "" || u.Hash == ""): // it may be a global one
			add(u, true)
		}
	}
	var settings state.Settings
	if self != nil {
		settings = self.Settings.Value
	}
	metadata := settings.Merge(a.cfg.Metadata)
	run, refused := state.GlobalsOn(a.cfg.ID, metadata, placed, globals)
	for _, name := range run {
		u := s.Units[name]
		add(u, u.Problem != "" || u.Record.Problem != "")
	}
	for name, why := range refused {
		if u := s.Units[name]; u.Requirements.Mismatch(a.cfg.ID, metadata) == "" {
			p.waiting[name] = state.UnitState{Epoch: u.Record.Created, Waiting: why}
		}
	}
	for name := range old.wants {
		if p.wants[name] == nil {
			changed++
		}
	}
	return p, changed
}

// sameMap reports whether two snapshots share a map, because nothing in it has
// changed between them.
func sameMap(a, b map[string]*state.Unit) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}

// newWant says what a unit's records want of a node of that generation. old is
// what an earlier version of them wanted, or nil: its text need not be read again.
func newWant(u *state.Unit, node string, generation int64, old *want) *want {
	r, at := u.Record.Value, u.Placement.Value
	w := &want{
		unit: u, generation: generation, Hash: u.Hash, Text: r.Text, Desired: r.Desired, Restarts: r.Restarts, Epoch: u.Record.Created,
		Exclusive: fenced(u.Requirements), Problem: u.Unreadable(),
	}
	if w.Problem == "" {
		w.Problem = u.Problem
	}
	if w.Problem == "" && len(r.Text) > maxText {
		w.Problem = fmt.Sprintf("its file has %d bytes, more than %d", len(r.Text), maxText)
	}
	if generation == 0 {
		w.Void = "this node is not registered"
	}
	if u.Placement.Exists() {
		w.Epoch = at.Epoch
		switch {
		case u.Unreadable() != "": // nothing is decided
		case at.Leave != "":
			w.Release = at.Leave
		case !u.Record.Exists():
			w.Release = "it was destroyed"
		case r.Desired == unit.Inactive:
			w.Release = "it shall be inactive"
		}
		switch {
		case w.Void != "":
		case at.Generation != generation:
			w.Void, w.Outlived = "the engine has not yet confirmed it after this node was away", true
		case at.Approved != u.Hash:
			w.Void = "the engine has not yet approved its file"
		}
	}
	if w.Problem != "" {
		return w
	}
	n, _ := unit.SplitName(u.Name)
	w.DropIn = dropIn(n, w, node)
	sum := sha256.Sum256([]byte(w.DropIn + "\x00" + w.Text))
	w.Sum = hex.EncodeToString(sum[:16])
	if old != nil && old.Problem == "" && old.Text == w.Text {
		w.After, w.Before, w.Install = old.After, old.Before, old.Install
	} else if f, err := unit.Parse(w.Text); err == nil { // it is: the snapshot has no problem with it
		w.After, w.Before = startedBefore(n, f)
		w.Install = slices.ContainsFunc(f.Options, func(o unit.Option) bool { return o.Section == "Install" })
	}
	return w
}

// fenced reports whether a unit runs behind the fence: nobody else may run it and
// somebody else could.
func fenced(r *unit.Requirements) bool { return r.Exclusive && r.MachineID == "" && !r.Global }

// dropIn is what is added to the unit's own file.
func dropIn(n unit.Name, w *want, node string) string {
	sections := map[string]string{"service": "Service", "socket": "Socket", "mount": "Mount", "swap": "Swap"}
	section := sections[n.Type]
	if section == "" { // it has no processes
		return ""
	}
	text := "[" + section + "]\n"
	if w.Exclusive {
		text = systemd.FenceDropIn(section)
	}
	// %n is put in by systemd after it has read quotes and backslashes.
	return text + fmt.Sprintf("Environment=\"FLOTILLA_EPOCH=%d\" \"FLOTILLA_UNIT=%%n\" \"FLOTILLA_MACHINE=%s\"\n", w.Epoch, node)
}
