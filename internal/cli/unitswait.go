package cli

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/client"
	"flotilla/internal/unit"
	"flotilla/internal/wire"
)

// waitLimit is how long something may take; 0: for ever.
type waitLimit = time.Duration

// waiting is how long a command waits for units.
type waiting struct {
	noBlock  bool
	attempts int // fleetctl's way: of blockStep each; 0: --timeout counts
	timeout  waitLimit
}

// blockStep is what one of fleetctl's --block-attempts stands for.
const blockStep = 250 * time.Millisecond

// add adds the flags. fleetctl waits for ever unless it is told otherwise.
func (w *waiting) add(cmd *cobra.Command, fleet bool) {
	limit := time.Minute
	if fleet {
		limit = 0
	}
	fl := cmd.Flags()
	fl.BoolVar(&w.noBlock, "no-block", false, "do not wait until the units are there; never waited for: global units")
	fl.IntVar(&w.attempts, "block-attempts", 0, "wait for N times a quarter of a second; 0: as long as --timeout says")
	fl.DurationVar(&w.timeout, "timeout", limit, "how long to wait; 0: for ever. After that the exit code is 3 (fleetctl: 1)")
}

func (w *waiting) limit() waitLimit {
	if w.attempts > 0 {
		return time.Duration(w.attempts) * blockStep
	}
	return w.timeout
}

// grace is how long after the limit of a wait the node may take to say its end.
const grace = 15 * time.Second

// await has the node wait for something and hands on what it says. left is how
// many of those that are waited for were not there at the end.
func (c *cli) await(ctx context.Context, what wire.Wait, limit waitLimit, on func(wire.WaitEvent)) (left int, err error) {
	if limit > 0 {
		what.Limit = limit.String()
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit+grace)
		defer cancel()
	}
	for e, err := range client.Lines[wire.WaitEvent](ctx, c.dial(), http.MethodPost, "/v1/wait", nil, what) {
		switch {
		case err != nil:
			return 0, err
		case e.Outcome != wire.WaitEnd:
			on(e)
		case e.Error != nil:
			return e.Left, e.Error
		default:
			return e.Left, nil
		}
	}
	return 0, wire.Errorf(client.CodeNoNode, "the change is made; see: flotilla list-units", "the node ended before the wait was over")
}

// unitLine says how far a unit is.
func unitLine(e wire.WaitEvent) string {
	line := fmt.Sprintf("Unit %s %s", e.Unit, e.Current)
	if e.Node != nil && e.Current != unit.Inactive {
		line += " on " + legend(*e.Node, false)
	}
	if e.Message != "" {
		line += " (" + e.Message + ")"
	}
	return line
}

// unitWords are what is said of units that are not where they should be, by whether
// fleetctl says it: [1] is the unit, [2] why, [3] the wanted state.
var unitWords = map[bool]struct{ failed, late, gone string }{
	false: {
		failed: "Unit %[1]s failed %[2]s",
		late:   "Unit %[1]s is not %[3]s: %[2]s",
		gone:   "Unit %[1]s was destroyed meanwhile",
	},
	true: {
		failed: "Error waiting for units: Failed to find an active unit %[1]s: %[2]s",
		late:   "Error waiting for units: timed out waiting for unit %[1]s to report state %[3]s\nUnit %[1]s: %[2]s",
		gone:   "Error waiting for units: unit %[1]s was destroyed meanwhile",
	},
}
