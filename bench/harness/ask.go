package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// Ask sends a request to the API behind a unix socket, in as its JSON body unless
// it is nil, and decodes the answer into out unless that is nil.
func Ask(ctx context.Context, socket, method, path string, in, out any) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(raw)
	}
	raw, err := exchange(ctx, &http.Client{Transport: transport}, method, "http://node"+path, body)
	if err != nil || out == nil {
		return err
	}
	return json.Unmarshal(raw, out)
}

// Delete sends a DELETE.
func Delete(ctx context.Context, url string) error {
	_, err := exchange(ctx, http.DefaultClient, http.MethodDelete, url, nil)
	return err
}

// Metrics reads what a URL serves in Prometheus' format; series of one metric are
// added up.
func Metrics(ctx context.Context, url string) (map[string]float64, error) {
	raw, err := exchange(ctx, http.DefaultClient, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	sums := map[string]float64{}
	for line := range strings.Lines(string(raw)) {
		end := strings.LastIndexByte(line, ' ')
		if strings.HasPrefix(line, "#") || end < 0 {
			continue
		}
		value, err := strconv.ParseFloat(strings.TrimSpace(line[end:]), 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %q: %w", url, line, err)
		}
		name, _, _ := strings.Cut(line[:end], "{")
		sums[name] += value
	}
	return sums, nil
}

func exchange(ctx context.Context, client *http.Client, method, url string, body io.Reader) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(resp.Body)
	if err = errors.Join(err, resp.Body.Close()); err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %.200s", method, url, resp.Status, raw)
	}
	return raw, err
}
