package store

import "time"

// SetPeriods makes a Reflector quick enough for a test.
func (r *Reflector) SetPeriods(fresh, check, hold time.Duration) {
	r.freshPeriod, r.checkPeriod, r.holdLimit = fresh, check, hold
}
