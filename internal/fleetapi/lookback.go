package fleetapi

import (
	"sync"
	"time"
)

// lookBackLimit is how long a stop is remembered.
const lookBackLimit = 2 * time.Second

// lookBack makes fleetctl's restart end. It asks for loaded, waits until it sees
// launched all the same, asks for launched and waits again; with fleet that ended
// because a stop took seconds. So who asks for the first time after a launched
// unit was stopped through fleet's API is told that it is launched.
type lookBack struct {
	mu      sync.Mutex
	stopped map[string]time.Time // by unit; guarded by mu
}

// note remembers that a launched unit was told to stop.
func (l *lookBack) note(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped == nil {
		l.stopped = map[string]time.Time{}
	}
	for old, at := range l.stopped {
		if time.Since(at) > lookBackLimit {
			delete(l.stopped, old)
		}
	}
	l.stopped[name] = time.Now()
}

// take reports whether the unit was told to stop a moment ago, once.
func (l *lookBack) take(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.stopped[name]
	delete(l.stopped, name)
	return ok && time.Since(at) <= lookBackLimit
}
