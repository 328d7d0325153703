package store

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"go.uber.org/zap/zapcore"
)

// slogCore is a zap core that writes to slog. Lines below Warn are dropped.
type slogCore struct {
	log    *slog.Logger
	quiet  []string     // lines that begin with one of these go to Debug
	fatal  io.Writer    // lines that end the process go here too; may be nil
	seen   func(string) // gets every line; may be nil
	fields []zapcore.Field
}

// quietServer are lines that etcd logs as warnings or errors although nothing is
// wrong, or many times for one event that another line reports.
var quietServer = []string{
	"Running http and grpc server on single port",
	"simple token is not cryptographically signed",
	"Failed to detect schema version",
	"Failed to detect storage schema version",
	"failed to update storage version",
	"lost TCP streaming connection",
	"closed TCP streaming connection",
	"prober detected unhealthy status",
	"failed to reach the peer URL",
	"failed to get version",
	"failed to find remote peer in cluster",
	"waiting for ReadIndex response took too long",
	"request stats",
	"setting up serving from embedded etcd failed",
	"stopping insecure grpc server",
	"stopped insecure grpc server",
	"stopping secure grpc server",
	"stopped secure grpc server",
}

func (c *slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	next := *c
	next.fields = append(c.fields[:len(c.fields):len(c.fields)], fields...)
	return &next
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	if c.seen != nil {
		c.seen(e.Message)
	}
	level := slog.LevelWarn
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelError
	}
	for _, q := range c.quiet {
		if strings.HasPrefix(e.Message, q) {
			level = slog.LevelDebug
		}
	}
	if e.Level < zapcore.DPanicLevel && !c.log.Enabled(context.Background(), level) {
		return nil
	}
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(c.fields[:len(c.fields):len(c.fields)], fields...) {
		f.AddTo(enc)
	}
	args := make([]any, 0, 2*len(enc.Fields))
	for k, v := range enc.Fields {
		if k == "error" {
			k = "err"
		}
		args = append(args, k, v)
	}
	if c.fatal != nil && e.Level >= zapcore.DPanicLevel {
		_, _ = fmt.Fprintln(c.fatal, "etcd:", e.Message, enc.Fields)
	}
	c.log.Log(context.Background(), level, "etcd: "+e.Message, args...)
	return nil
}

func (c *slogCore) Sync() error { return nil }
