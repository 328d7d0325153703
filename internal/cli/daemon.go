package cli

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
)

// daemon returns the path of flotillad: beside this program, else in PATH.
func daemon() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program's own path: %w", err)
	}
	dir := filepath.Dir(self)
	if path, err := exec.LookPath(filepath.Join(dir, "flotillad")); err == nil {
		return path, nil
	}
	path, err := exec.LookPath("flotillad")
	if err != nil {
		return "", hinted{fmt.Errorf("flotillad, which runs nodes, is neither in %s nor in PATH", dir),
			[]string{"install flotillad of the same version beside flotilla; make build makes both"}}
	}
	return path, nil
}

// doctorCommand hands its command line to flotillad, whose settings it is about.
func doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check whether this machine can run a node well, and say what to do",
		DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error {
			path, err := daemon()
			if err != nil {
				return err
			}
			err = syscall.Exec(path, append([]string{"flotillad", "doctor"}, args...), os.Environ())
			return fmt.Errorf("run %s doctor: %w", path, err)
		},
	}
}

// elsewhere is a command that is not here, and says where it is.
func elsewhere(name, there string) *cobra.Command {
	return &cobra.Command{
		Use: name, Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return Usage(fmt.Sprintf("there is no command %q", cmd.CommandPath()), "did you mean: "+there)
		},
	}
}
