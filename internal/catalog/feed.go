package catalog

import "flotilla/internal/feed"

// Feed hands the newest Snapshot to its readers; nil until the first is published.
type Feed = feed.Feed[*Snapshot]

// NewFeed returns a Feed that has no snapshot yet.
func NewFeed() *Feed { return feed.New[*Snapshot](nil) }
