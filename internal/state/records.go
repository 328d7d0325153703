package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"strings"

	"flotilla/internal/unit"
)

// Version is the "v" of the records written here. Records of a higher version
// are not used: a newer program wrote them.
const Version = 1

// UnitRecord is what is wanted of one unit.
type UnitRecord struct {
	V        int          `json:"v"`
	Text     string       `json:"text"` // the unit file, byte for byte as it was given
	Desired  unit.Desired `json:"desired"`
	Restarts int64        `json:"restarts,omitempty"` // grows by one with each restart asked for
}

// Placement says which node a unit belongs to. It is the lock that makes two
// places for one unit impossible.
type Placement struct {
	V          int    `json:"v"`
	Node       string `json:"node"`       // its ID
	Generation int64  `json:"generation"` // of the node, see Node.Generation
	Epoch      int64  `json:"epoch"`      // grows with each placement of the unit: a revision of the store
	// Approved is the hash of the unit file that was checked against the node and
	// all that is on it. A node does not run another file.
	Approved string `json:"approved"`
	Reason   string `json:"reason"` // why there
	// Leave is why the node shall stop the unit and then delete this record; ""
	// while the unit may stay.
	Leave string `json:"leave,omitempty"`
}

// Unplaced says why a unit that should run has no node.
type Unplaced struct {
	V      int    `json:"v"`
	Reason string `json:"reason"` // "3 nodes: 2 conflict with a.service, 1 has no disk=ssd"
}

// Move asks for a unit to be on another node.
type Move struct {
	V      int    `json:"v"`
	To     string `json:"to"` // ID of a node
	Reason string `json:"reason"`
}

// NodeRecord is what a node says of itself, for as long as its lease lives. It
// does not change while the node runs.
type NodeRecord struct {
	V        int               `json:"v"`
	ID       string            `json:"id"` // as in /etc/machine-id
	Name     string            `json:"name"`
	Address  string            `json:"address"`        // primary IP
	Peer     string            `json:"peer,omitempty"` // ip:port on which other nodes ask
	BootID   string            `json:"boot_id"`        // tells a restart from a second machine with the same ID
	Started  int64             `json:"started"`        // Unix seconds, of the node's process
	Version  string            `json:"version"`
	Metadata map[string]string `json:"metadata,omitempty"` // from the configuration
	Memory   int64             `json:"memory"`             // bytes that units may reserve
	CPU      int64             `json:"cpu"`                // thousandths of a core that units may reserve
	Counters map[string]int64  `json:"counters,omitempty"`
	Units    bool              `json:"units"`  // it runs units; false where there is no systemd
	Routes   bool              `json:"routes"` // it routes services; false for a fleetd
	// Session is another one each time the node cannot know whether the record is
	// still on the lease that it renews: when it sees its present one it does.
	Session string `json:"session,omitempty"`
}

// Settings are what operators want of a node, whether it is there or not.
type Settings struct {
	V int `json:"v"`
	// Metadata overlays the node's own; "" hides a key of it.
	Metadata map[string]string `json:"metadata,omitempty"`
	Cordon   bool              `json:"cordon,omitempty"` // nothing new is placed there
	// Drain takes the node out of its balancer and moves the units that are placed
	// there; global units stay.
	Drain  bool   `json:"drain,omitempty"`
	Reason string `json:"reason,omitempty"` // why it is cordoned or drained
}

// Merge returns a node's own metadata overlaid by what was set. own is not
// changed.
func (s Settings) Merge(own map[string]string) map[string]string {
	merged := maps.Clone(own)
	if merged == nil {
		merged = map[string]string{}
	}
	for k, v := range s.Metadata {
		if v == "" {
			delete(merged, k)
		} else {
			merged[k] = v
		}
	}
	return merged
}

// Leader names the node that leads.
type Leader struct {
	V    int    `json:"v"`
	Node string `json:"node"` // its ID
	Name string `json:"name"`
}

// Failover is written by the engine when so many nodes are gone that it moves
// nothing by itself, and by the API when somebody says that it shall.
type Failover struct {
	V       int      `json:"v"`
	Held    []string `json:"held,omitempty"`    // nodes whose units wait
	Until   int64    `json:"until,omitempty"`   // Unix seconds: then it goes on by itself
	Allowed bool     `json:"allowed,omitempty"` // somebody said: go on
}

// RouterReport is what a node says of its router.
type RouterReport struct {
	V        int   `json:"v"`
	Applied  int64 `json:"applied"` // catalog revision that it runs
	Serving  bool  `json:"serving"`
	Draining bool  `json:"draining"`
	// Refused are the services of which it does not run what is wanted: for each
	// the revision that it could not apply.
	Refused map[string]int64 `json:"refused,omitempty"`
}

// UnitsReport is what runs on one node, whole: what is not in it is not there.
type UnitsReport struct {
	V     int                  `json:"v"`
	Units map[string]UnitState `json:"units"`
}

// UnitState is what systemd says of one unit on one node.
type UnitState struct {
	Hash     string `json:"hash"` // of the file that is on the node
	Epoch    int64  `json:"epoch,omitempty"`
	Load     string `json:"load"`
	Active   string `json:"active"`
	Sub      string `json:"sub"`
	Launched bool   `json:"launched,omitempty"` // it was started, and not stopped since
	Restarts int64  `json:"restarts,omitempty"` // of the UnitRecord: the restart that was carried out last
	// Trouble is what keeps the unit from running there for good: the file cannot
	// be loaded, or systemd has given up starting it. The engine looks for another
	// node. A process that ended with an error is no trouble.
	Trouble string `json:"trouble,omitempty"`
	// Waiting is why a global unit that is meant for every node is not on this one,
	// or why a unit is not yet started.
	Waiting string `json:"waiting,omitempty"`
}

// Record is any of the values above.
type Record interface {
	UnitRecord | Placement | Unplaced | Move | NodeRecord | Settings | Leader | Failover | RouterReport | UnitsReport
}

// Encode writes a record as JSON.
func Encode[R Record](r R) string {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings, numbers and maps of them cannot fail
	}
	return string(b)
}

// Item is one record as the store has it. The zero Item is a record that is not
// there.
type Item[R Record] struct {
	// Value is what the record says; while Problem is set, what it said when it
	// could last be read.
	Value    R
	Created  int64                      // revision of its creation; 0: it is not there
	Modified int64                      // revision of its last change
	Problem  string                     // why it cannot be read; "" if it can
	unknown  map[string]json.RawMessage // fields that this program does not know
}

// Exists reports whether the record is there, readable or not.
func (i Item[R]) Exists() bool { return i.Modified != 0 }

// Usable reports whether the record is there and can be read.
func (i Item[R]) Usable() bool { return i.Modified != 0 && i.Problem == "" }

// With returns the record's new value as it is to be written: r, and the fields
// of the old value that this program does not know.
func (i Item[R]) With(r R) string {
	if len(i.unknown) == 0 {
		return Encode(r)
	}
	fields := maps.Clone(i.unknown)
	var own map[string]json.RawMessage
	if err := json.Unmarshal([]byte(Encode(r)), &own); err != nil {
		panic(err) // Encode has just written it
	}
	maps.Copy(fields, own)
	b, err := json.Marshal(fields)
	if err != nil {
		panic(err) // all of it is JSON
	}
	return string(b)
}

// next is the item after a write of its key.
func (i Item[R]) next(value string, created, modified int64) Item[R] {
	r, unknown, err := decode[R](value)
	n := Item[R]{Value: r, Created: created, Modified: modified, unknown: unknown}
	if err != nil {
		n.Value, n.Problem = i.Value, err.Error()
	}
	return n
}

// Decode reads a record. Errors: it is not JSON of that shape, or of a newer
// version than this program knows.
func Decode[R Record](value string) (R, error) {
	r, _, err := decode[R](value)
	return r, err
}

func decode[R Record](value string) (r R, unknown map[string]json.RawMessage, err error) {
	in := json.NewDecoder(strings.NewReader(value))
	in.DisallowUnknownFields()
	if err := in.Decode(&r); err != nil || in.More() || version(r) != Version {
		return decodeSlowly[R]([]byte(value))
	}
	return r, nil, nil
}

// decodeSlowly reads what decode cannot: a record with unknown fields, or finds
// out what is wrong with it.
func decodeSlowly[R Record](value []byte) (r R, unknown map[string]json.RawMessage, err error) {
	var head struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(value, &head); err != nil {
		return r, nil, fmt.Errorf("record is not valid: %w", err)
	}
	if head.V != Version {
		return r, nil, fmt.Errorf("record has version %d, this program reads %d: upgrade it", head.V, Version)
	}
	if err := json.Unmarshal(value, &r); err != nil {
		var none R
		return none, nil, fmt.Errorf("record is not valid: %w", err)
	}
	if err := json.Unmarshal(value, &unknown); err != nil {
		return r, nil, fmt.Errorf("record is not valid: %w", err)
	}
	t := reflect.TypeFor[R]()
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		delete(unknown, name)
	}
	return r, unknown, nil
}

func version[R Record](r R) int64 { return reflect.ValueOf(r).Field(0).Int() }

// CheckNodeID returns what is wrong with a node's ID, or nil. systemd's machine
// IDs are 32 hexadecimal digits; others are let pass if they cannot break a key.
func CheckNodeID(id string) error {
	switch {
	case id == "":
		return errors.New("the node's ID is empty")
	case len(id) > 64 || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.") != "":
		return fmt.Errorf("node ID %q is not up to 64 letters, digits, dots, dashes and underscores", id)
	}
	return nil
}
