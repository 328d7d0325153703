// Package registry is what the store holds about units and machines: where each
// record is, how it is written and read, and who writes it. It knows unit files;
// it must not know how the store is reached, nor the rules by which units are
// placed or run.
//
//	units/<unit>                 Unit       what is wanted                        written by the API
//	placements/<unit>            Placement  where it is to run: the lock that     engine; agent on release
//	                                        makes two places impossible
//	schedules/<machine>/<unit>   Entry      all that the machine needs to run it  engine; agent on release
//	schedules/global/<unit>      Entry      the same, for every machine           engine
//	unplaced/<unit>              Unplaced   why it is nowhere                     engine
//	moves/<unit>                 Move       somebody wants it elsewhere           API; engine when done
//	machines/<machine>           Machine    there as long as the machine's lease  agent
//	states/<machine>             States     what runs there; on the same lease    agent
//	settings/<machine>           Settings   what operators set; outlives the      API
//	                                        machine
//	solo                         Solo       the only machine there is             agent
//	leaders/engine/<lease>                  the election                          engine
//	failover                     Failover   mass failure: held or allowed         engine, API
package registry

import (
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"flotilla/internal/unit"
)

// Version is the "v" of the records written here. Records of a higher version
// are refused: a newer program wrote them.
const Version = 1

// DefaultPrefix is where the records are unless the node was told otherwise.
const DefaultPrefix = "/flotilla/"

// Keys builds the keys of the records below a prefix.
type Keys struct{ Prefix string } // ends in a slash

// Unit names and machine IDs have no slash: see CheckMachineID and unit.CheckName.

func (k Keys) Unit(name string) string           { return k.Prefix + "units/" + name }
func (k Keys) Placement(name string) string      { return k.Prefix + "placements/" + name }
func (k Keys) Schedule(machine string) string    { return k.Prefix + "schedules/" + machine + "/" }
func (k Keys) Entry(machine, name string) string { return k.Schedule(machine) + name }
func (k Keys) Unplaced(name string) string       { return k.Prefix + "unplaced/" + name }
func (k Keys) Move(name string) string           { return k.Prefix + "moves/" + name }
func (k Keys) Machine(id string) string          { return k.Prefix + "machines/" + id }
func (k Keys) States(id string) string           { return k.Prefix + "states/" + id }
func (k Keys) Settings(id string) string         { return k.Prefix + "settings/" + id }
func (k Keys) Solo() string                      { return k.Prefix + "solo" }
func (k Keys) Failover() string                  { return k.Prefix + "failover" }
func (k Keys) EngineElection() string            { return k.Prefix + "leaders/engine/" }

// Global takes the place of a machine's ID in the keys of global units.
const Global = "global"

// Desired is what somebody wants of a unit.
type Desired = unit.Desired

// See unit.Desired.
const (
	Inactive = unit.Inactive
	Loaded   = unit.Loaded
	Launched = unit.Launched
)

// ParseDesired reads a desired state. The error lists the three.
func ParseDesired(s string) (Desired, error) { return unit.ParseDesired(s) }

// Unit is what is wanted of one unit.
type Unit struct {
	V        int     `json:"v"`
	Text     string  `json:"text"` // the unit file, byte for byte as it was given
	Desired  Desired `json:"desired"`
	Restarts int64   `json:"restarts,omitempty"` // grows by one with each restart asked for
}

// Placement says which machine a unit belongs to.
type Placement struct {
	V          int    `json:"v"`
	Machine    string `json:"machine"`
	Generation int64  `json:"generation"` // of the machine, see Machine
	Epoch      int64  `json:"epoch"`      // grows with each placement of the unit: a revision of the store
	Reason     string `json:"reason"`     // why there
}

// Entry is one unit in the schedule of a machine, or of all machines.
type Entry struct {
	V          int     `json:"v"`
	Text       string  `json:"text"`
	Desired    Desired `json:"desired"` // loaded or launched
	Restarts   int64   `json:"restarts,omitempty"`
	Generation int64   `json:"generation,omitempty"` // as in Placement; 0 for global units
	Epoch      int64   `json:"epoch,omitempty"`      // as in Placement; for global units the create revision of the unit
	// Release is why the machine shall stop and forget the unit and then delete
	// placement and entry; "" while it may keep it.
	Release string `json:"release,omitempty"`
}

// Unplaced says why a unit that should run has no machine.
type Unplaced struct {
	V      int    `json:"v"`
	Reason string `json:"reason"` // "3 machines: 2 conflict with a.service, 1 has no disk=ssd"
}

// Move asks for a unit to be on another machine.
type Move struct {
	V      int    `json:"v"`
	To     string `json:"to"` // machine ID
	Reason string `json:"reason"`
}

// Machine is a machine that is there. Its generation is the create revision of
// its key: it changes when the machine was gone for as long as its lease, that
// is, when its units may have been given away.
type Machine struct {
	V        int               `json:"v"`
	ID       string            `json:"id"`                 // as in /etc/machine-id
	BootID   string            `json:"boot_id"`            // tells a restart from a second machine with the same ID
	Node     string            `json:"node"`               // the node's name
	Address  string            `json:"address"`            // primary IP
	API      string            `json:"api,omitempty"`      // ip:port on which other nodes ask for logs
	Metadata map[string]string `json:"metadata,omitempty"` // from the configuration
	Memory   int64             `json:"memory"`             // bytes that units may reserve
	CPU      int64             `json:"cpu"`                // thousandths of a core that units may reserve
	Counters map[string]int64  `json:"counters,omitempty"`
	Units    bool              `json:"units"` // it runs units; false where there is no systemd
	Version  string            `json:"version"`
	// Session is another one each time the agent cannot know whether the record
	// is still on the lease that it renews: when it sees its present one it does.
	Session string `json:"session,omitempty"`
}

// Settings are what operators want of a machine, whether it is there or not.
type Settings struct {
	V int `json:"v"`
	// Metadata overlays the machine's own; "" hides a key of it.
	Metadata map[string]string `json:"metadata,omitempty"`
	Cordon   bool              `json:"cordon,omitempty"` // nothing new is placed there
	Drain    bool              `json:"drain,omitempty"`  // what is placed there leaves; global units stay
	Reason   string            `json:"reason,omitempty"` // why it is cordoned or drained
}

// Merge returns a machine's own metadata overlaid by what was set. own is not
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

// Solo names the machine that was the only one: its exclusive units are never
// placed elsewhere until it says that it is no longer alone, or somebody deletes
// this record.
type Solo struct {
	V       int    `json:"v"`
	Machine string `json:"machine"`
}

// Failover is written by the engine when so many machines are gone that it moves
// nothing by itself, and by the API when somebody says that it shall.
type Failover struct {
	V       int      `json:"v"`
	Held    []string `json:"held,omitempty"`    // machines whose units wait
	Until   int64    `json:"until,omitempty"`   // Unix seconds: then it goes on by itself
	Allowed bool     `json:"allowed,omitempty"` // somebody said: go on
}

// States is what runs on one machine, whole: what is not in it is not there.
type States struct {
	V     int              `json:"v"`
	Units map[string]State `json:"units"`
}

// State is what systemd says of one unit on one machine.
type State struct {
	Hash     string `json:"hash"` // of the file that is on the machine
	Epoch    int64  `json:"epoch,omitempty"`
	Load     string `json:"load"`
	Active   string `json:"active"`
	Sub      string `json:"sub"`
	Launched bool   `json:"launched,omitempty"` // it was started, and not stopped since
	Restarts int64  `json:"restarts,omitempty"` // of the Entry: the restart that was carried out last
	// Trouble is what keeps the unit from running there for good: the file
	// cannot be loaded, or systemd has given up starting it. The engine looks
	// for another machine. A process that ended with an error is no trouble.
	Trouble string `json:"trouble,omitempty"`
	// Waiting is why a global unit that is meant for every machine is not on
	// this one, or why a unit is not yet started.
	Waiting string `json:"waiting,omitempty"`
}

// Record is any of the values above.
type Record interface {
	Unit | Placement | Entry | Unplaced | Move | Machine | Settings | Solo | Failover | States
}

// Encode writes a record as JSON.
func Encode[R Record](r R) string {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings, numbers and maps of them cannot fail
	}
	return string(b)
}

// Decode reads a record. Errors: it is not JSON of that shape, or of a newer
// version than this program knows.
func Decode[R Record](value string) (r R, err error) {
	// As Encode begins: that saves half of the work.
	if !strings.HasPrefix(value, `{"v":`+strconv.Itoa(Version)+`,`) {
		var head struct {
			V int `json:"v"`
		}
		if err := json.Unmarshal([]byte(value), &head); err != nil {
			return r, fmt.Errorf("record is not valid: %w", err)
		}
		if head.V != Version {
			return r, fmt.Errorf("record has version %d, this program reads %d: upgrade it", head.V, Version)
		}
	}
	if err := json.Unmarshal([]byte(value), &r); err != nil {
		return r, fmt.Errorf("record is not valid: %w", err)
	}
	return r, nil
}

// CheckMachineID returns what is wrong with a machine's ID, or nil. systemd's
// are 32 hexadecimal digits; others are let pass if they cannot break a key.
func CheckMachineID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("the machine ID is empty")
	case id == Global:
		return fmt.Errorf("machine ID %q has a meaning of its own", id)
	case len(id) > 64 || strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.") != "":
		return fmt.Errorf("machine ID %q is not up to 64 letters, digits, dots, dashes and underscores", id)
	}
	return nil
}
