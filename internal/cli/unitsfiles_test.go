package cli

import "testing"

func TestUnitName(t *testing.T) {
	for _, tc := range []struct{ arg, name, file string }{
		{"web", "web.service", "web.service"},
		{"dir/web.service", "web.service", "dir/web.service"},
		{"./web@1", "web@1.service", "web@1.service"},
		{"multi-user.target", "multi-user.target", "multi-user.target"},
		{"web.1", "web.1.service", "web.1.service"},
		{"/abs/a.timer", "a.timer", "/abs/a.timer"},
	} {
		if name, file := unitName(tc.arg); name != tc.name || file != tc.file {
			t.Errorf("%s: %s in %s, want %s in %s", tc.arg, name, file, tc.name, tc.file)
		}
	}
}
