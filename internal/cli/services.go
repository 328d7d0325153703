package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"flotilla/internal/catalog"
	"flotilla/internal/text"
	"flotilla/internal/wire"
)

func (c *cli) servicesCommand() *cobra.Command {
	return c.clientFlags(group("services", "List, change and explain services",
		c.servicesList(), c.servicesSet(), c.servicesRemove(), c.servicesExplain(), c.servicesProblems(), c.servicesConfirm()))
}

func (c *cli) servicesList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List all services", Args: Between(0, 0, ""),
		RunE: asking(c, http.MethodGet, "/v1/services", nil, sayServices),
	}
}

func sayServices(w io.Writer, list []wire.ServiceSummary) {
	if len(list) == 0 {
		Say(w, "No services yet. Add one: flotilla services set web --scheme http --endpoint 10.0.0.5:8080\n")
		return
	}
	number := func(n int) string {
		if n == 0 {
			return "-"
		}
		return strconv.Itoa(n)
	}
	rows := [][]string{{"NAME", "SCHEME", "ENDPOINTS", "HOST PORT", "PRIVATE", "DOMAINS", "PROBLEMS"}}
	for _, s := range list {
		endpoints := strconv.Itoa(s.Endpoints)
		if s.Draining > 0 {
			endpoints += fmt.Sprintf(" (%d draining)", s.Draining)
		}
		rows = append(rows, []string{s.Name, dash(s.Scheme), endpoints, number(s.HostPort), yes(s.Private), dash(strings.Join(s.Domains, ",")), number(s.Problems)})
	}
	table(w, rows...)
}

// setFlags are those of services set.
type setFlags struct {
	scheme                  string
	endpoints, dropEndpoint []string
	hostPort                int
	private                 bool
	domains, dropDomains    []string
	options                 []string
	drain, undrain          []string
	weight, zone            []string
	converge
}

func (c *cli) servicesSet() *cobra.Command {
	var f setFlags
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Create or change a service; what is not given stays",
		Example: `  flotilla services set web --scheme http --endpoint 10.0.0.5:8080 --endpoint 10.0.0.6:8080
  flotilla services set web --endpoint 2=10.0.0.7:8080 --drain 1 --wait
  flotilla services set db --scheme tcp --endpoint 10.0.0.9:5432 --host-port 5432`,
		Args: Between(1, 1, "the name of a service"), ValidArgsFunction: c.completeServices,
		RunE: func(cmd *cobra.Command, args []string) error {
			change, err := f.change(cmd)
			if err != nil {
				return err
			}
			return c.write(cmd, http.MethodPut, args[0], change, f.converge, "service "+args[0]+" is as asked already", "service "+args[0]+" set")
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.scheme, "scheme", "", "http, https, http-and-https or tcp")
	fl.StringArrayVar(&f.endpoints, "endpoint", nil, "ip:port, or NAME=ip:port to name it or to change that one (repeatable)")
	fl.StringArrayVar(&f.dropEndpoint, "remove-endpoint", nil, "name of an endpoint to remove (repeatable)")
	fl.IntVar(&f.hostPort, "host-port", 0, "port on every node; 0 removes it")
	fl.BoolVar(&f.private, "private", false, "no public route by host or path; --private=false makes it public")
	fl.StringArrayVar(&f.domains, "domain", nil, "custom domain to add, exact or *.example.com (repeatable)")
	fl.StringArrayVar(&f.dropDomains, "remove-domain", nil, "custom domain to remove (repeatable)")
	fl.StringArrayVar(&f.options, "option", nil, "NAME=VALUE, such as strip_path=true; NAME= goes back to the default (repeatable)")
	fl.StringArrayVar(&f.drain, "drain", nil, "name of an endpoint that takes no new requests (repeatable)")
	fl.StringArrayVar(&f.undrain, "undrain", nil, "name of an endpoint that takes requests again (repeatable)")
	fl.StringArrayVar(&f.weight, "weight", nil, "NAME=0..256, share of an endpoint; 100 is usual (repeatable)")
	fl.StringArrayVar(&f.zone, "zone", nil, "NAME=TEXT, where an endpoint is (repeatable)")
	f.converge.add(cmd)
	err := cmd.RegisterFlagCompletionFunc("scheme", cobra.FixedCompletions([]string{"http", "https", "http-and-https", "tcp"}, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(fmt.Sprintf("complete --scheme: %v", err)) // no such flag: a mistake in this program
	}
	return cmd
}

// converge says whether a write waits until every node routes it, and how long.
type converge struct {
	wait    bool
	timeout time.Duration
}

func (v *converge) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&v.wait, "wait", false, "return when every live node routes it, and say how long each took")
	cmd.Flags().DurationVar(&v.timeout, "timeout", 30*time.Second, "how long to --wait; after that the exit code is 3")
}

// write changes a service and prints what came of it.
func (c *cli) write(cmd *cobra.Command, method, service string, body any, v converge, same, done string) error {
	query := url.Values{}
	if v.wait {
		query.Set("wait", v.timeout.String())
	}
	var written wire.Written
	err := c.dial().Do(cmd.Context(), method, "/v1/services/"+url.PathEscape(service), query, body, &written)
	return show(c, cmd, written, err, sayWritten(same, done))
}

// change turns the flags that were given into the body of a request.
func (f *setFlags) change(cmd *cobra.Command) (wire.ServiceChange, error) {
	var change wire.ServiceChange
	given := cmd.Flags().Changed
	if given("scheme") {
		change.Scheme = &f.scheme
	}
	if given("host-port") {
		change.HostPort = &f.hostPort
	}
	if given("private") {
		change.Private = &f.private
	}
	change.AddDomains, change.DropDomains = f.domains, f.dropDomains
	for _, e := range f.endpoints {
		name, addr, named := strings.Cut(e, "=")
		if !named {
			change.AddEndpoints = append(change.AddEndpoints, e)
			continue
		}
		set(&change.Endpoints, name, &addr)
	}
	for _, name := range f.dropEndpoint {
		set(&change.Endpoints, name, nil)
	}
	for _, o := range f.options {
		name, value, ok := strings.Cut(o, "=")
		if !ok {
			return change, Usage(fmt.Sprintf("--option %q is not NAME=VALUE", o), "such as --option strip_path=true")
		}
		set(&change.Options, name, scalar(value))
	}
	for _, m := range []struct {
		flag, field string
		values      []string
		fixed       json.RawMessage // for flags that name an endpoint only
	}{
		{"drain", "drain", f.drain, json.RawMessage("true")},
		{"undrain", "drain", f.undrain, json.RawMessage("null")},
		{"weight", "weight", f.weight, nil},
		{"zone", "zone", f.zone, nil},
	} {
		for _, v := range m.values {
			name, value, ok := strings.Cut(v, "=")
			field := m.fixed
			if field == nil {
				if !ok || name == "" {
					return change, Usage(fmt.Sprintf("--%s %q is not ENDPOINT=VALUE", m.flag, v), fmt.Sprintf("such as --%s 1=50", m.flag))
				}
				if field = scalar(value); m.flag == "zone" && value != "" {
					field = quoted(value)
				}
			}
			if change.Meta == nil {
				change.Meta = map[string]map[string]json.RawMessage{}
			}
			fields := change.Meta[name]
			set(&fields, m.field, field)
			change.Meta[name] = fields
		}
	}
	return change, nil
}

func set[V any](m *map[string]V, key string, value V) {
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[key] = value
}

// scalar returns a value as JSON: numbers, true and false as they are, nothing as
// null, all else as a string.
func scalar(value string) json.RawMessage {
	if value == "" {
		return json.RawMessage("null")
	}
	if json.Valid([]byte(value)) && !strings.ContainsAny(value[:1], `[{"`) {
		return json.RawMessage(value)
	}
	return quoted(value)
}

func quoted(value string) json.RawMessage {
	raw, err := json.Marshal(value)
	if err != nil { // a string always is JSON
		return json.RawMessage("null")
	}
	return raw
}

// sayWritten prints the result of a write.
func sayWritten(same, done string) func(w io.Writer, written wire.Written) {
	return func(w io.Writer, written wire.Written) {
		if written.Changed {
			Say(w, "%s at revision %d\n", done, written.Revision)
		} else {
			Say(w, "%s\n", same)
		}
		slowest := 0.0
		for _, a := range written.Applied {
			slowest = max(slowest, a.MS)
			Say(w, "  %s routes it after %.0f ms\n", a.Node, a.MS)
		}
		if n := len(written.Applied); n > 0 {
			Say(w, "applied on %s in %.0f ms\n", text.Count(n, "node"), slowest)
		}
	}
}

func (c *cli) servicesRemove() *cobra.Command {
	var v converge
	cmd := &cobra.Command{
		Use: "remove NAME...", Short: "Remove services and all their keys",
		Args: Between(1, 1000, "the name of a service"), ValidArgsFunction: c.completeServices,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				if err := c.write(cmd, http.MethodDelete, name, nil, v, "", "service "+name+" removed"); err != nil {
					return err
				}
			}
			return nil
		},
	}
	v.add(cmd)
	return cmd
}

func (c *cli) servicesProblems() *cobra.Command {
	return &cobra.Command{
		Use: "problems", Short: "List every key that is not usable, with its remedy", Args: Between(0, 0, ""),
		RunE: asking(c, http.MethodGet, "/v1/problems", nil, func(w io.Writer, list []catalog.Problem) {
			if len(list) == 0 {
				Say(w, "No problems.\n")
			}
			sayProblems(w, list)
		}),
	}
}

func sayProblems(w io.Writer, list []catalog.Problem) {
	for _, p := range list {
		Say(w, "  %s\n    value:  %s\n    reason: %s\n    remedy: %s\n", NewPainter(w).Yellow(p.Key), p.Value, p.Reason, p.Remedy)
	}
}

func (c *cli) servicesConfirm() *cobra.Command {
	return &cobra.Command{
		Use: "confirm", Short: "Accept that most endpoints vanished at once, or that the store holds another state", Args: Between(0, 0, ""),
		Long: `When more than half of all endpoints vanish in one step they stay routed, in case
it is a mistake. This command says that it is meant, for all nodes. On a node
whose store suddenly holds another or an older state, it accepts that state, for
this node alone.`,
		RunE: asking(c, http.MethodPost, "/v1/confirm", nil, sayWritten("confirmed", "confirmed")),
	}
}

func (c *cli) servicesExplain() *cobra.Command {
	return &cobra.Command{
		Use: "explain NAME", Short: "Show every key of a service, what it does, and where the service is reached",
		Args: Between(1, 1, "the name of a service"), ValidArgsFunction: c.completeServices,
		RunE: asking(c, http.MethodGet, "/v1/services/{}", nil, sayService),
	}
}

func sayService(w io.Writer, e wire.ServiceExplanation) {
	p := NewPainter(w)
	what := e.Scheme + ", " + text.Count(e.Endpoints, "endpoint")
	if e.Scheme == "" {
		what = p.Yellow("not routable")
	}
	Say(w, "%s: %s, revision %d\n", p.Bold(e.Name), what, e.Revision)
	for _, n := range e.Notes {
		Say(w, "%s %s\n", p.Yellow("note:"), n)
	}
	Say(w, "\n%s\n", p.Bold("Keys"))
	rows := [][]string{}
	for _, k := range e.Keys {
		meaning := k.Meaning
		switch {
		case k.Held:
			meaning += " (deleted; the deletion is held back)"
		case k.InForce != "":
			meaning += " (not usable; in force is " + k.InForce + ")"
		}
		rows = append(rows, []string{"  " + k.Key, k.Value, meaning})
	}
	table(w, rows...)
	if len(e.Problem) > 0 {
		Say(w, "\n%s\n", p.Bold("Problems"))
		sayProblems(w, e.Problem)
	}
	Say(w, "\n%s\n", p.Bold("Reached at"))
	rows = nil
	for _, r := range e.Routes {
		rows = append(rows, []string{"  " + r.To, r.Note})
	}
	if len(rows) == 0 {
		Say(w, "  nowhere\n")
	}
	table(w, rows...)
	if cs := e.Counters; cs != nil {
		Say(w, "\n%s\n  %s\n", p.Bold("On this node"), counters(cs))
	}
	Say(w, "\n%s\n", p.Bold("Nodes"))
	rows = nil
	for _, n := range e.Nodes {
		state := "applied"
		if !n.Reached {
			state = "behind"
		}
		rows = append(rows, []string{"  " + n.Node, state, "at revision " + strconv.FormatInt(n.Revision, 10)})
	}
	table(w, rows...)
}

func counters(c *wire.ServiceCounters) string {
	var classes []string
	for class, n := range c.Requests.All() {
		classes = append(classes, fmt.Sprintf("%d x %s", n, class))
	}
	slices.Sort(classes)
	said := fmt.Sprintf("%d connections, %d errors, %d retries, %d active, %d queued", c.Connections, c.Errors, c.Retries, c.Active, c.Queued)
	if len(classes) > 0 {
		said = strings.Join(classes, ", ") + "; " + said + fmt.Sprintf(", %.1f ms to the answer", c.ResponseMS)
	}
	return said
}

func (c *cli) completeServices(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return complete(c, len(args) == 0 || cmd.Name() == "remove", "/v1/services", prefix, func(list []wire.ServiceSummary) (words []string) {
		for _, s := range list {
			words = append(words, s.Name+"\t"+dash(s.Scheme)+", "+text.Count(s.Endpoints, "endpoint"))
		}
		return words
	}), cobra.ShellCompDirectiveNoFileComp
}
