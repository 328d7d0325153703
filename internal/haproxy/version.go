package haproxy

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"sync"
)

// Version is HAProxy's, as far as behaviour depends on it.
type Version struct {
	Major, Minor int
	Full         string // such as "2.6.12-1+deb12u4"
}

var versionPattern = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(\d+)\.(\d+)[-.\w+~]*`)
})

// ParseVersion finds the version in text such as "HAProxy version 2.6.12-1 ...".
func ParseVersion(text string) (Version, error) {
	m := versionPattern().FindStringSubmatch(text)
	if m == nil {
		return Version{}, fmt.Errorf("no HAProxy version in %.80q", text)
	}
	major, err := strconv.Atoi(m[1])
	if err != nil {
		return Version{}, fmt.Errorf("HAProxy version %q: %w", m[0], err)
	}
	minor, err := strconv.Atoi(m[2])
	if err != nil {
		return Version{}, fmt.Errorf("HAProxy version %q: %w", m[0], err)
	}
	return Version{Major: major, Minor: minor, Full: m[0]}, nil
}

// BinaryVersion asks the program at path for its version.
func BinaryVersion(ctx context.Context, path string) (Version, error) {
	out, err := exec.CommandContext(ctx, path, "-v").Output()
	if err != nil {
		return Version{}, fmt.Errorf("run %s -v: %w", path, err)
	}
	return ParseVersion(string(out))
}

func (v Version) atLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

// DeletesServers reports whether "del server" is safe. Before 3.0 it crashes the
// worker when a request waits to try the server again, so there a server that is
// no longer wanted is parked and used again.
func (v Version) DeletesServers() bool { return v.atLeast(3, 0) }

// MakesBackends reports whether backends can be made and removed at run time.
func (v Version) MakesBackends() bool { return v.atLeast(3, 4) }
