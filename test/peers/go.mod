// Peers to measure against, built by test/peers.sh. There is no package here, so
// go mod tidy would remove all of this: the module names their versions, and
// go.sum the checksums of their sources, which hold the checksums of all that
// they are built from.
module flotilla/test/peers

go 1.26

require (
	github.com/abtreece/confd v0.20.0
	github.com/traefik/traefik/v3 v3.6.0
)
