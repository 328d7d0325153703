package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"
)

// scene is what both stories have: nodes, and a load whose fate is told.
type scene struct {
	*teller
	binary string
	nodes  []*node
	load   load
}

// end shows what can be played with and waits for ctx to end, unless once is
// set. It returns how the story has ended.
func (s *scene) end(ctx context.Context, once bool, tryNext func()) error {
	if ctx.Err() != nil {
		return errors.New("stopped before the end of the story")
	}
	if !once {
		tryNext()
		<-ctx.Done()
	}
	if s.load.lost() > 0 {
		return errLost
	}
	return nil
}

// How long each phase goes on once what it waits for has happened.
const phaseLength = 2 * time.Second

// untilAnswer waits until a request of this kind to the node has a good answer,
// one from the backend of that name unless it is empty.
func (s *scene) untilAnswer(ctx context.Context, n *node, k kind, backend string) error {
	return until(ctx, 20*time.Second, n.name+" to route "+k.scheme, func() error {
		c := &conn{node: n}
		port, request := k.request(n)
		err := c.exchange(k, port, request)
		c.close()
		if err == nil && !strings.HasPrefix(c.answer, backend) {
			return fmt.Errorf("%q answers", c.answer)
		}
		return err
	})
}

// untilIn waits until the balancer sends requests to the node.
func (s *scene) untilIn(ctx context.Context, n *node) error {
	return until(ctx, 30*time.Second, n.name+" to be in the balancer", func() error {
		if n.process != nil {
			select {
			case <-n.process.ended:
				return errors.New("it has ended")
			default:
			}
		}
		if in, _ := n.balance.now(); !in {
			return errors.New("its check fails")
		}
		return nil
	})
}

// count lets the phase go on for a while and says what came of it.
func (s *scene) count(ctx context.Context, p *phase) error {
	select {
	case <-time.After(phaseLength):
	case <-ctx.Done():
		return ctx.Err()
	}
	s.say("  %s", s.verdict(p))
	for _, why := range p.reasons() {
		s.say("  %s", s.paint(red, why))
	}
	return nil
}

// verdict says in one line what became of the requests of a phase so far.
func (s *scene) verdict(p *phase) string {
	line := fmt.Sprintf("%d requests, %d answered", p.sent(), p.count[answered].Load())
	if c, r := p.count[cut].Load(), p.count[refused].Load(); c+r > 0 {
		line += fmt.Sprintf(", %d cut off, %d refused", c, r)
	}
	n := p.count[lost].Load()
	colour := green
	if n > 0 {
		colour = red
	}
	return line + ", " + s.paint(colour, fmt.Sprintf("%d lost", n)) + "."
}

// sums shows the table of all phases.
func (s *scene) sums() {
	s.step("The sums")
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(cells ...any) { _, _ = fmt.Fprintf(w, strings.Repeat("%v\t", len(cells))+"\n", cells...) }
	row("while", "requests", "answered", "cut off", "refused", "lost", "slowest")
	var total [outcomes]int64
	var sent int64
	for _, p := range s.load.phases {
		for o := range total {
			total[o] += p.count[o].Load()
		}
		sent += p.sent()
		row(p.name, p.sent(), p.count[answered].Load(), p.count[cut].Load(), p.count[refused].Load(), p.count[lost].Load(), took(time.Duration(p.slowest.Load())))
	}
	row("together", sent, total[answered], total[cut], total[refused], total[lost], "")
	_ = w.Flush() // to memory
	for line := range strings.Lines(b.String()) {
		s.say("  %s", strings.TrimRight(line, "\n"))
	}
	s.say("  cut off  was under way at the router, or the node, that was killed, or half answered from there")
	s.say("  refused  was sent there before the next check (each %s) took it out of the balancer", took(checkEvery))
	s.say("  lost     every other failure, of any kind: has to be 0")
	if total[lost] == 0 {
		s.say("  %s", s.paint(green, fmt.Sprintf("No request was lost, beyond the %d that were at the killed router and node themselves.", total[cut]+total[refused])))
		return
	}
	s.say("  %s", s.paint(red, fmt.Sprintf("%d requests were lost.", total[lost])))
	for _, p := range s.load.phases {
		for _, why := range p.reasons() {
			s.say("  %s: %s", p.name, why)
		}
	}
}
