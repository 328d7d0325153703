package provision

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"flotilla/internal/nodeconfig"
)

// Cluster is a cluster on the machines of a provider.
type Cluster struct {
	Provider
	Name string
	// Tell is told what has been reached, one event at a time; nil: nobody is.
	Tell func(Event)

	telling sync.Mutex // held during Tell
}

// Event is something that Grow has reached.
type Event struct {
	Machine Machine
	Joined  bool          // it has joined the cluster; else it has booted
	Took    time.Duration // since the machine, or Grow, was begun
}

func (c *Cluster) tell(e Event) {
	c.telling.Lock()
	defer c.telling.Unlock()
	if c.Tell != nil {
		c.Tell(e)
	}
}

// Growth is what Grow is to reach.
type Growth struct {
	Nodes    int  // as many as there are to be at least
	Spec     Spec // of new machines, without name and files
	Programs nodeconfig.Programs
	Settings []nodeconfig.Setting // of new nodes, beside name and join
	Limit    time.Duration        // within which all nodes have to join
}

// ErrNotJoined is the error of Grow when a node does not join within the limit.
var ErrNotJoined = errors.New("has not joined")

// Grow makes the machines that are missing, starts those that are off, and
// returns when all nodes see each other. It can be repeated.
func (c *Cluster) Grow(ctx context.Context, g Growth) error {
	began := time.Now()
	machines, err := c.List(ctx)
	if err != nil {
		return err
	}
	names, founded := newNames(machines, g.Nodes), slices.ContainsFunc(machines, func(m Machine) bool { return m.Complete })
	// The first node founds the store and the others join it. It is complete
	// before any other is begun, so that a second try makes it the same way.
	first := 0
	if !founded && len(names) > 0 {
		first = 1
		if err := c.start(ctx, g, names[0], nil, machines); err != nil {
			return err
		}
	}
	err = each(names[first:], func(name string) error {
		join := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
		return c.start(ctx, g, name, join, machines)
	})
	if err != nil {
		return err
	}
	return c.awaitJoined(ctx, began, g.Limit)
}

// awaitJoined waits until all nodes have joined, and tells of each.
func (c *Cluster) awaitJoined(ctx context.Context, began time.Time, limit time.Duration) error {
	machines, err := c.List(ctx)
	if err != nil {
		return err
	}
	names := make([]string, len(machines))
	byName := map[string]Machine{}
	for i, m := range machines {
		names[i], byName[m.Name] = m.Name, m
	}
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = each(names, func(name string) error {
		node := c.API(name)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for lacks := "it has not answered"; ; {
			now := missing(wait, node, names)
			if now == "" {
				c.tell(Event{Machine: byName[name], Joined: true, Took: time.Since(began)})
				return nil
			}
			if wait.Err() == nil { // an answer, not that the time is up
				lacks = now
			}
			select {
			case <-tick.C:
			case <-wait.Done():
				return fmt.Errorf("node %s %w within %s: %s", name, ErrNotJoined, limit, lacks)
			}
		}
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// newNames returns the names of the machines, and as many of n1, n2 and so on as
// are missing of that number.
func newNames(machines []Machine, number int) []string {
	var names []string
	for _, m := range machines {
		names = append(names, m.Name)
	}
	for i := 1; len(names) < number; i++ {
		if name := fmt.Sprintf("n%d", i); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// start makes one node and starts it.
func (c *Cluster) start(ctx context.Context, g Growth, name string, join []string, before []Machine) error {
	began := time.Now()
	settings := []nodeconfig.Setting{{Name: "name", Value: name}, {Name: "join", Value: strings.Join(join, ",")}}
	files, err := nodeconfig.Files(g.Programs, slices.Concat(settings, g.Settings))
	if err != nil {
		return err
	}
	spec := g.Spec
	spec.Name, spec.Files = name, files
	m, err := c.Make(ctx, spec)
	if err == nil && !slices.ContainsFunc(before, func(b Machine) bool { return b.Name == name && b.Running }) {
		c.tell(Event{Machine: m, Took: time.Since(began)})
	}
	return err
}

// each does the same to all names at once and returns all errors.
func each(names []string, do func(name string) error) error {
	failed := make([]error, len(names))
	var all sync.WaitGroup
	for i, name := range names {
		all.Go(func() { failed[i] = do(name) })
	}
	all.Wait()
	return errors.Join(failed...)
}
