// The real fleet, built by test/fleet.sh. There is no package here, so go mod
// tidy would remove all of this.
//
// fleet 1.0.0 is older than modules and names no versions. These are tags near
// the commits of its glide.lock, of which the module proxy has few, with two
// exceptions: the etcd client is the last one under its old name, for those
// before decode with a library that panics in today's Go; and gRPC is held at
// its old version because fleet uses what was removed since.
module flotilla/test/fleet

go 1.26

require (
	github.com/coreos/etcd v3.3.27+incompatible
	github.com/coreos/fleet v1.0.0
	github.com/coreos/go-semver v0.3.1
	github.com/coreos/go-systemd v0.0.0-20161114122254-48702e0da86b
	github.com/glacjay/goini v0.0.0-20161120062552-fd3024d87ee2
	github.com/godbus/dbus v4.1.0+incompatible
	github.com/gogo/protobuf v1.3.2
	github.com/jonboulle/clockwork v0.1.0
	github.com/json-iterator/go v1.1.12
	github.com/modern-go/reflect2 v1.0.2
	github.com/pborman/uuid v1.2.1
	github.com/prometheus/client_golang v0.8.0
	github.com/rakyll/globalconf v0.0.0-20180912185831-87f8127c421f
	github.com/spf13/cobra v0.0.1
	github.com/spf13/pflag v1.0.0
	github.com/vishvananda/netlink v1.0.0
	github.com/vishvananda/netns v0.0.5
	google.golang.org/api v0.1.0
)

replace google.golang.org/grpc => google.golang.org/grpc v1.0.5
