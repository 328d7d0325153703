package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"flotilla/internal/client"
	"flotilla/internal/unitapi"
)

// unitView is a unit as the API shows it.
type unitView struct{ unitapi.Unit }

// refusal is why the node did not take a unit; "" if it did.
func refusal(r unitapi.Result) string {
	switch r.Outcome {
	case unitapi.Missing:
		return "the cluster does not have it"
	case unitapi.Refused:
	default:
		return ""
	}
	why := []string{}
	if r.Reason != "" {
		why = append(why, r.Reason)
	}
	for _, p := range r.Problems {
		if !p.Warning {
			why = append(why, p.Reason)
		}
	}
	return strings.Join(why, "; ")
}

// mostNames are asked for by name; of more, all units are fetched.
const mostNames = 128

// units returns the units of these names that exist; all of them for none.
func (c *cli) units(ctx context.Context, names ...string) (map[string]unitView, error) {
	query := url.Values{}
	if len(names) <= mostNames {
		query["name"] = names
	}
	var answer unitapi.Units
	if err := c.dial().Do(ctx, http.MethodGet, "/v1/units", query, nil, &answer); err != nil {
		return nil, err
	}
	found := make(map[string]unitView, len(answer.Units))
	for _, u := range answer.Units {
		found[u.Name] = unitView{u}
	}
	if len(names) > mostNames {
		wanted := map[string]bool{}
		for _, name := range names {
			wanted[name] = true
		}
		maps.DeleteFunc(found, func(name string, _ unitView) bool { return !wanted[name] })
	}
	return found, nil
}

func sortedUnits(units map[string]unitView) []unitView {
	var list []unitView
	for _, name := range slices.Sorted(maps.Keys(units)) {
		list = append(list, units[name])
	}
	return list
}

// unitText returns one unit with its text; ok is false if there is none.
func (c *cli) unitText(ctx context.Context, name string) (u unitView, ok bool, err error) {
	err = c.dial().Do(ctx, http.MethodGet, "/v1/units/"+url.PathEscape(name), nil, nil, &u.Unit)
	if isNotFound(err) {
		return u, false, nil
	}
	return u, err == nil, err
}

// mostText is about how many bytes of unit files go into one request.
const mostText = 512 << 10

// submitUnits writes units, in as few requests as it takes.
func (c *cli) submitUnits(ctx context.Context, units []unitapi.Submission) (map[string]unitapi.Result, error) {
	results := map[string]unitapi.Result{}
	for len(units) > 0 {
		n, size := 0, 0
		for n < len(units) && (n == 0 || size+len(units[n].Text) <= mostText) {
			size += len(units[n].Text)
			n++
		}
		var answer unitapi.Results
		body := unitapi.Submissions{Units: units[:n]}
		if err := c.dial().Do(ctx, http.MethodPost, "/v1/units", nil, body, &answer); err != nil {
			return results, err
		}
		for _, r := range answer.Results {
			results[r.Name] = r
		}
		units = units[n:]
	}
	return results, nil
}

// changeUnits changes units that are there.
func (c *cli) changeUnits(ctx context.Context, change unitapi.Changes) (map[string]unitapi.Result, error) {
	results := map[string]unitapi.Result{}
	if len(change.Names) == 0 {
		return results, nil
	}
	var answer unitapi.Results
	if err := c.dial().Do(ctx, http.MethodPost, "/v1/units/change", nil, change, &answer); err != nil {
		return nil, err
	}
	for _, r := range answer.Results {
		results[r.Name] = r
	}
	return results, nil
}

// machines returns all registered machines by ID.
func (c *cli) machines(ctx context.Context) ([]unitapi.Machine, error) {
	answer, err := c.machinesAndFailover(ctx)
	return answer.Machines, err
}

func (c *cli) machinesAndFailover(ctx context.Context) (answer unitapi.Machines, err error) {
	err = c.dial().Do(ctx, http.MethodGet, "/v1/machines", nil, nil, &answer)
	return answer, err
}

// findMachine returns the machine that text means: its ID, a beginning of it
// that no other has, the name of its node or its address.
func findMachine(all []unitapi.Machine, text string) (unitapi.Machine, error) {
	var found []unitapi.Machine
	for _, m := range all {
		switch text {
		case m.ID, m.Node, m.Address:
			return m, nil
		}
		if text != "" && strings.HasPrefix(m.ID, text) {
			found = append(found, m)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return unitapi.Machine{}, hinted{fmt.Errorf("there is no machine %q", text), []string{"list them with: flotilla list-machines --full"}}
	}
	return unitapi.Machine{}, hinted{fmt.Errorf("%d machines have an ID that begins with %q", len(found), text), []string{"list them with: flotilla list-machines --full"}}
}

func isNotFound(err error) bool {
	var e *client.Error
	return errors.As(err, &e) && e.Code == client.CodeNotFound
}
