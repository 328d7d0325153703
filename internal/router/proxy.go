package router

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"flotilla/internal/catalog"
	"flotilla/internal/haproxy"
)

// attach learns what the running HAProxy runs, whoever started it, or lets it be
// started with a file of our own.
func (r *Router) attach(ctx context.Context, snapshot *catalog.Snapshot) error {
	answers, err := r.client.Do(ctx, "show info", "get var proc.gen")
	if err != nil {
		if r.cfg.Supervise || !r.disk.exists() {
			r.offer(ctx, snapshot)
		}
		return fmt.Errorf("HAProxy is not running yet: %w", err)
	}
	info := haproxy.ParseInfo(answers[0].Text)
	version, err := haproxy.ParseVersion(info["Version"])
	if err != nil {
		return err
	}
	generation, err := parseGeneration(answers[1].Text)
	if err != nil {
		return err
	}
	r.version = version
	if err := r.readAll(ctx); err != nil {
		return err
	}
	r.slots.reset(r.have, version.MakesBackends(), time.Now())
	for service, backend := range r.slots.used {
		r.owners.Store(backend, service)
	}
	token := fmt.Sprintf("set map %s attached %s", r.mapFile(haproxy.StateMap), r.token)
	drain := fmt.Sprintf("set map %s draining %s", r.mapFile(haproxy.StateMap), yes(r.draining))
	set, err := r.client.Do(ctx, token, drain)
	if err != nil {
		return err
	}
	if err := errors.Join(set[0].Err(), set[1].Err()); err != nil {
		return fmt.Errorf("attach to HAProxy: map %s: %w", haproxy.StateMap, err)
	}
	r.attached = true
	r.startable()
	r.done = nil // compare everything
	r.disk.pid, _ = strconv.Atoi(info["Pid"])
	r.disk.stale, r.disk.all = true, true
	r.reload.generation = generation
	r.counts.resyncs++
	r.log.Info("attached to HAProxy", "version", version.Full, "pid", r.disk.pid, "generation", generation)
	if err := r.ports.resync(ctx, r.have); err != nil {
		r.log.Warn("host ports", "err", err)
	}
	if int64(uint32(generation)) != r.layout() {
		r.reload.ask(time.Time{}, "the configuration that HAProxy runs has other settings")
	}
	return nil
}

var generationPattern = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`value=<(-?\d+)>`)
})

func parseGeneration(text string) (int64, error) {
	m := generationPattern().FindStringSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("the HAProxy on our socket does not run flotilla's configuration (proc.gen: %.80q)", text)
	}
	return strconv.ParseInt(m[1], 10, 64)
}

// guard asks which node process is attached to the HAProxy that answers.
func (r *Router) guard() string {
	return fmt.Sprintf("get map %s attached", r.mapFile(haproxy.StateMap))
}

func (r *Router) isOurs(a haproxy.Answer) bool { return strings.Contains(a.Text, r.token) }

// do sends commands to the HAProxy that we are attached to. An error means that
// we are attached no longer.
func (r *Router) do(ctx context.Context, commands ...string) ([]haproxy.Answer, error) {
	r.counts.commands += uint64(len(commands))
	answers, err := r.client.DoIf(ctx, r.guard(), r.isOurs, commands...)
	if err != nil {
		r.attached = false
	}
	return answers, err
}

// execute carries out steps and reads back whatever they touched; what HAProxy
// made of them is in r.have afterwards. The result tells what it refused, by
// service.
func (r *Router) execute(ctx context.Context, steps []Step) (refused map[string]string, err error) {
	const atOnce = 4000 // commands over one connection
	for len(steps) > 0 {
		var commands []string
		var of []int
		backends, entries := map[string]bool{}, map[entry]bool{}
		n := 0
		for ; n < len(steps) && len(commands) < atOnce; n++ {
			step := steps[n]
			for _, cmd := range r.commands(step) {
				commands = append(commands, cmd)
				of = append(of, n)
			}
			if step.Map != "" {
				entries[entry{step.Map, step.Key}] = true
			} else {
				backends[step.Backend] = true
			}
			if step.Do == MakeBackend {
				r.have.apply(step)
				r.disk.stale = true
			}
			r.log.Debug("step", "do", step.String())
		}
		sent := len(commands)
		backendList, entryList := slices.Sorted(maps.Keys(backends)), slices.Collect(maps.Keys(entries))
		commands = append(commands, r.readCommands(backendList, entryList)...)
		answers, err := r.do(ctx, commands...)
		if err != nil {
			return refused, err
		}
		for i, a := range answers[:sent] {
			if err := a.Err(); err != nil {
				step := steps[of[i]]
				if refused == nil {
					refused = map[string]string{}
				}
				refused[r.serviceOf(step)] = fmt.Sprintf("%s: %s", commands[i], err)
			}
		}
		if err := r.learn(backendList, entryList, answers[sent:]); err != nil {
			return refused, err
		}
		if err := r.ports.follow(ctx, steps[:n]); err != nil {
			r.log.Warn("host ports", "err", err)
		}
		steps = steps[n:]
	}
	return refused, nil
}

func (r *Router) serviceOf(step Step) string {
	if step.Map != "" {
		_, service := haproxy.RouteOwner(step.Value)
		return service
	}
	service, _ := r.owners.Load(step.Backend)
	name, _ := service.(string)
	return name
}

// commands returns a step in HAProxy's words.
func (r *Router) commands(s Step) []string {
	switch s.Do {
	case MakeBackend:
		class, _ := haproxy.ClassOf(s.Backend)
		publish := "publish backend " + s.Backend
		if _, ok := r.have.backends[s.Backend]; ok {
			return []string{publish}
		}
		return []string{"add backend " + s.Backend + " from " + class.Defaults(), publish}
	case AddServer:
		return []string{haproxy.AddServer(s.Backend, s.Server)}
	case MoveServer:
		return []string{haproxy.SetAddr(s.Backend, s.Server.Name, s.Server.Addr)}
	case SetWeight:
		return []string{haproxy.SetWeight(s.Backend, s.Server.Name, s.Server.Weight)}
	case SetState, ParkServer:
		return []string{haproxy.SetState(s.Backend, s.Server.Name, s.Server.State)}
	case SetCookies:
		return []string{haproxy.CookieKey(s.Backend)}
	case SetRoute:
		verb := "add"
		if _, ok := r.have.routes[entry{s.Map, s.Key}]; ok {
			verb = "set"
		}
		return []string{fmt.Sprintf("%s map %s %s %s", verb, r.mapFile(s.Map), s.Key, s.Value)}
	case DelRoute:
		return []string{fmt.Sprintf("del map %s %s", r.mapFile(s.Map), s.Key)}
	}
	panic("router: no command for " + string(s.Do))
}

func (r *Router) readCommands(backends []string, entries []entry) []string {
	var commands []string
	for _, b := range backends {
		commands = append(commands, haproxy.ServersState(b))
	}
	for _, e := range entries {
		commands = append(commands, fmt.Sprintf("get map %s %s", r.mapFile(e.Map), e.Key))
	}
	return commands
}

// readBack reads the given backends and map entries into r.have.
func (r *Router) readBack(ctx context.Context, backends []string, entries []entry) error {
	answers, err := r.do(ctx, r.readCommands(backends, entries)...)
	if err != nil {
		return err
	}
	return r.learn(backends, entries, answers)
}

// learn takes over the answers to readCommands.
func (r *Router) learn(backends []string, entries []entry, answers []haproxy.Answer) error {
	for i, b := range backends {
		if _, ok := r.have.backends[b]; !ok {
			continue
		}
		if answers[i].Err() != nil || strings.Contains(answers[i].Text, "Can't find backend") {
			delete(r.have.backends, b)
			r.disk.stale = true
			continue
		}
		servers, err := haproxy.ParseServers(answers[i].Text)
		if err != nil {
			return err
		}
		if is := byName(servers[b]); !maps.Equal(is, r.have.backends[b]) {
			r.have.backends[b] = is
			r.disk.stale = true
		}
	}
	for i, e := range entries {
		if is := parseMapValue(answers[len(backends)+i].Text); is != r.have.routes[e] {
			r.have.setRoute(e, is)
			r.disk.stale = true
		}
	}
	return nil
}

func byName(servers []haproxy.Server) map[string]haproxy.Server {
	m := make(map[string]haproxy.Server, len(servers))
	for _, s := range servers {
		m[s.Name] = s
	}
	return m
}

var mapValuePattern = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`found=yes.* value="([^"]*)"`)
})

// parseMapValue reads the answer to "get map"; "" is no such entry.
func parseMapValue(text string) string {
	if m := mapValuePattern().FindStringSubmatch(text); m != nil {
		return m[1]
	}
	return ""
}

func parseBackends(text string) []string {
	var names []string
	for line := range strings.SplitSeq(text, "\n") {
		if line != "" && line[0] != '#' {
			names = append(names, line)
		}
	}
	return names
}

// readAll reads everything that HAProxy runs into r.have.
func (r *Router) readAll(ctx context.Context) error {
	commands := []string{"show backend", haproxy.ServersState("")}
	routeMaps := r.routeMaps()
	for _, m := range routeMaps {
		commands = append(commands, "show map "+r.mapFile(m))
	}
	r.counts.commands += uint64(len(commands))
	answers, err := r.client.Do(ctx, commands...)
	if err != nil {
		return err
	}
	servers, err := haproxy.ParseServers(answers[1].Text)
	if err != nil {
		return err
	}
	have := newState()
	for _, b := range parseBackends(answers[0].Text) {
		if _, ok := haproxy.ClassOf(b); ok {
			have.backends[b] = byName(servers[b])
		}
	}
	for i, m := range routeMaps {
		for key, value := range haproxy.ParseMap(answers[2+i].Text) {
			have.setRoute(entry{m, key}, value)
		}
	}
	r.have = have
	return nil
}

// routeMaps are the maps of routes that the configuration uses.
func (r *Router) routeMaps() []string {
	return slices.DeleteFunc(slices.Clone(haproxy.Maps), func(m string) bool {
		return m == haproxy.StateMap || m == haproxy.SNIMap && r.cfg.SNIPort == 0
	})
}

// auditor goes through all backends and maps again and again, a part each tick,
// because somebody will change HAProxy by hand.
type auditor struct {
	backends []string // still to be read in this round
	maps     []string
	all      int // backends that the round began with
	left     int // ticks that it still has
}

// auditTicks is how many parts one round has: it takes 40 s.
const auditTicks = 40 * ticksPerSecond

// auditSome reads what is due of a round. It talks to HAProxy only if something
// is, or if told to see whether it is still the same one.
func (r *Router) auditSome(ctx context.Context, see bool) error {
	a := &r.audit
	if a.left == 0 {
		*a = auditor{backends: slices.Sorted(maps.Values(r.slots.used)), maps: r.routeMaps(), all: len(r.slots.used), left: auditTicks}
	}
	a.left--
	part := a.backends[:len(a.backends)-a.all*a.left/auditTicks]
	a.backends = a.backends[len(part):]
	part = slices.DeleteFunc(part, func(b string) bool { _, ok := r.have.backends[b]; return !ok })
	mapDue := len(a.maps) > len(haproxy.Maps)*a.left/auditTicks
	if len(part) == 0 && !mapDue && !see && len(r.lacking) == 0 {
		return nil
	}
	before := map[string]map[string]haproxy.Server{}
	for _, b := range part {
		before[b] = r.have.backends[b]
	}
	if err := r.readBack(ctx, part, nil); err != nil {
		return err
	}
	suspects := map[string]bool{}
	for _, b := range part {
		if !maps.Equal(before[b], r.have.backends[b]) {
			service, _ := r.owners.Load(b)
			name, _ := service.(string)
			suspects[name] = true
		}
	}
	if mapDue {
		m := a.maps[0]
		a.maps = a.maps[1:]
		if err := r.auditMap(ctx, m, suspects); err != nil {
			return err
		}
	}
	if len(suspects) > 0 {
		r.counts.drift += uint64(len(suspects))
		r.log.Warn("HAProxy was changed by somebody else", "services", slices.Sorted(maps.Keys(suspects)))
	}
	for name := range r.lacking {
		suspects[name] = true
	}
	if len(suspects) == 0 || r.done == nil {
		return nil
	}
	return r.reconcile(ctx, r.done, slices.Sorted(maps.Keys(suspects)))
}

// auditMap reads one map file and adds the services whose entries differ from
// what we know.
func (r *Router) auditMap(ctx context.Context, m string, suspects map[string]bool) error {
	answers, err := r.do(ctx, "show map "+r.mapFile(m))
	if err != nil {
		return err
	}
	is := haproxy.ParseMap(answers[0].Text)
	var lost []entry
	for e, value := range r.have.routes {
		if e.Map == m && is[e.Key] != value {
			lost = append(lost, e)
		}
	}
	for _, e := range lost {
		_, service := haproxy.RouteOwner(r.have.routes[e])
		suspects[service] = true
		r.have.setRoute(e, is[e.Key])
	}
	for key, value := range is {
		if e := (entry{m, key}); r.have.routes[e] != value {
			_, service := haproxy.RouteOwner(value)
			suspects[service] = true
			r.have.setRoute(e, value)
		}
	}
	return nil
}
