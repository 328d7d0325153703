// Package haproxy is the edge to one HAProxy: its configuration file, its Runtime
// API and its statistics. It knows backends, servers and maps; it must not know
// services or how they come about.
package haproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// ServersState is the command whose answer ParseServers reads; backend "" is all.
func ServersState(backend string) string {
	return strings.TrimSpace("show servers state " + backend)
}

// Bits of srv_admin_state.
const (
	adminMaint = 0x01 | 0x02 // forced, inherited; 0x04 only says that the file had it so
	adminDrain = 0x08 | 0x10 // forced, inherited
)

// ParseServers reads the answer to ServersState: servers by backend. A backend
// that has no servers does not appear.
func ParseServers(text string) (map[string][]Server, error) {
	found := map[string][]Server{}
	for line := range strings.SplitSeq(text, "\n") {
		if line == "" || line == "1" || line[0] == '#' {
			continue
		}
		backend, s, err := parseServer(line)
		if err != nil {
			return nil, err
		}
		if s.Addr.IsValid() {
			found[backend] = append(found[backend], s)
		}
	}
	return found, nil
}

func parseServer(line string) (backend string, s Server, err error) {
	f := strings.Fields(line)
	if len(f) < 19 {
		return "", s, fmt.Errorf("haproxy server state %.200q: %d fields, want 19", line, len(f))
	}
	admin, err1 := strconv.Atoi(f[6])
	weight, err2 := strconv.Atoi(f[7])
	port, err3 := strconv.ParseUint(f[18], 10, 16)
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			return "", s, fmt.Errorf("haproxy server state %.200q: %w", line, err)
		}
	}
	s = Server{Name: f[3], Weight: weight}
	// A unix socket or an unresolved name has no address and is not ours.
	if addr, err := netip.ParseAddr(f[4]); err == nil {
		s.Addr = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	switch {
	case admin&adminMaint != 0:
		s.State = Maint
	case admin&adminDrain != 0:
		s.State = Drain
	}
	return f[1], s, nil
}

// ParseMap reads the answer to "show map": values by key. Every entry begins with
// its address in memory; all else, such as an error, is none.
func ParseMap(text string) map[string]string {
	entries := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		address, rest, ok := strings.Cut(line, " ")
		if !ok || !strings.HasPrefix(address, "0x") {
			continue
		}
		if key, value, ok := strings.Cut(rest, " "); ok {
			if _, dup := entries[key]; !dup { // the first one wins in HAProxy, too
				entries[key] = value
			}
		}
	}
	return entries
}

// ParseConns reads the answer to "show servers conn": connections in use by
// backend/server.
func ParseConns(text string) map[string]int {
	used := map[string]int{}
	column := -1
	for line := range strings.SplitSeq(text, "\n") {
		f := strings.Fields(line)
		if len(f) > 0 && f[0] == "#" {
			column = slices.Index(f, "used_cur") - 1 // the "#" is a field of the heading only
		} else if column >= 0 && len(f) > column {
			if n, err := strconv.Atoi(f[column]); err == nil {
				used[f[0]] = n
			}
		}
	}
	return used
}

// ParseStats reads the answer to "show stat": one map of column to value a row.
func ParseStats(text string) []map[string]string {
	var rows []map[string]string
	var columns []string
	for line := range strings.SplitSeq(text, "\n") {
		if strings.HasPrefix(line, "# ") {
			columns = strings.Split(line[2:], ",")
			continue
		}
		if line == "" || columns == nil {
			continue
		}
		row := map[string]string{}
		for i, v := range strings.Split(line, ",") {
			if i < len(columns) && v != "" {
				row[columns[i]] = v
			}
		}
		rows = append(rows, row)
	}
	return rows
}

// ParseInfo reads the answer to "show info": values by name.
func ParseInfo(text string) map[string]string {
	info := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		if k, v, ok := strings.Cut(line, ": "); ok {
			info[k] = v
		}
	}
	return info
}
