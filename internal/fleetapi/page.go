package fleetapi

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
)

// pageToken says which page of a list is asked for. Every page is cut from a
// list that is read anew.
type pageToken struct {
	limit uint16 // items on a page
	page  uint16 // from 1
}

// parsePage reads the page that a request asks for. Errors are in fleet's words.
func parsePage(query url.Values, limit int) (pageToken, error) {
	values := query["nextPageToken"]
	switch len(values) {
	case 0:
		return pageToken{uint16(limit), 1}, nil
	case 1:
	default:
		return pageToken{}, errors.New("too many values for page token")
	}
	raw, err := base64.URLEncoding.DecodeString(values[0])
	switch {
	case err != nil:
		return pageToken{}, err
	case len(raw) == 0:
		return pageToken{}, io.EOF
	case len(raw) < 4:
		return pageToken{}, io.ErrUnexpectedEOF
	}
	t := pageToken{binary.LittleEndian.Uint16(raw), binary.LittleEndian.Uint16(raw[2:])}
	switch {
	case int(t.limit) != limit:
		return pageToken{}, fmt.Errorf("token limit must be %d", limit)
	case t.page == 0:
		return pageToken{}, errors.New("token page must be greater than zero")
	}
	return t, nil
}

func (t pageToken) String() string {
	raw := binary.LittleEndian.AppendUint16(nil, t.limit)
	return base64.URLEncoding.EncodeToString(binary.LittleEndian.AppendUint16(raw, t.page))
}

// cut returns the items of the page and the token of the next one, "" if there
// is none. As in fleet, a page that ends with the last item has a next one,
// which is empty.
func cut[T any](all []T, t pageToken) (items []T, next string) {
	begin, end := (int(t.page)-1)*int(t.limit), int(t.page)*int(t.limit)
	switch {
	case begin >= len(all):
		return nil, ""
	case end > len(all):
		return all[begin:], ""
	case t.page == 1<<16-1:
		return all[begin:end], "" // no token can name the next one
	}
	return all[begin:end], pageToken{t.limit, t.page + 1}.String()
}
