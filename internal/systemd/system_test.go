//go:build system

package systemd

import (
	"testing"

	"flotilla/internal/systemd/systemdtest"
)

func TestMain(m *testing.M) { systemdtest.Main(m, "trixie", "bookworm") }
