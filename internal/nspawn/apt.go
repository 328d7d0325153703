package nspawn

import (
	"regexp"
	"slices"
	"strings"
	"sync"
)

// indexFormat is what apt is asked to print for each of its package lists, one
// a line. Apt itself reads sources.list and all its relatives then.
const indexFormat = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)"

// Where Debian is if the host knows no mirror of it.
const publicMirror, publicSecurity = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"

// The suites of Debian by which a mirror of it is recognised among the host's
// sources; those of other distributions have other names.
var debianSuites = []string{"bullseye", "bookworm", "trixie", "forky", "duke", "sid", "oldstable", "stable", "testing", "unstable"}

// sourceLines returns the apt sources for the release: from the mirrors that the
// host itself uses, given apt's answer to indexFormat, else from the public ones.
func sourceLines(release, targets string) []string {
	mirror, security := "", ""
	for line := range strings.Lines(targets) {
		fields := strings.Split(strings.TrimSpace(line), "|")
		if len(fields) != 3 || fields[2] != "main" {
			continue
		}
		uri := strings.TrimSuffix(fields[0], "/")
		suite, isSecurity := strings.CutSuffix(fields[1], "-security")
		switch {
		case !slices.Contains(debianSuites, suite):
		case isSecurity && security == "":
			security = uri
		case !isSecurity && mirror == "":
			mirror = uri
		}
	}
	if mirror == "" {
		mirror = publicMirror
		if security == "" {
			security = publicSecurity
		}
	}
	lines := []string{"deb " + mirror + " " + release + " main"}
	if security != "" { // a host without it may not reach it
		lines = append(lines, "deb "+security+" "+release+"-security main")
	}
	return lines
}

// The settings of the host's apt that say how servers are reached and believed.
var carried = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?i)^Acquire::((http|https|ftp|tor)::|Check-Valid-Until |Check-Date |Max-ValidTime |ForceIPv|Retries |Queue-Mode |proxy)`)
})

// aptOptions returns the arguments that give mmdebstrap those settings of the
// host, given the output of apt-config dump.
func aptOptions(config string) []string {
	var args []string
	for line := range strings.Lines(config) {
		if line = strings.TrimSpace(line); carried().MatchString(line) && !strings.HasSuffix(line, `"";`) {
			args = append(args, "--aptopt="+line)
		}
	}
	if len(args) > 0 {
		// Passwords of servers are in files beside the settings.
		args = append(args, `--aptopt=Dir::Etc::netrc "/etc/apt/auth.conf"`, `--aptopt=Dir::Etc::netrcparts "/etc/apt/auth.conf.d"`)
	}
	return args
}
