package fleetapi

import (
	"fmt"
	"net/http"
)

// Error is the body of an answer that is none of the above, as
// {"error": Error}. The codes are those of the node's API.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	status  int
}

func (e *Error) Error() string { return e.Message }

func fail(status int, hint, format string, args ...any) *Error {
	return &Error{Code: codeOf(status), Message: fmt.Sprintf(format, args...), Hint: hint, status: status}
}

// codeOf returns the word for a status.
func codeOf(status int) string {
	switch status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return "bad_request"
	case http.StatusNotFound:
		return "not_found"
	case http.StatusConflict:
		return "conflict"
	case http.StatusUnprocessableEntity:
		return "invalid"
	case http.StatusServiceUnavailable:
		return "store_unavailable"
	case http.StatusGatewayTimeout:
		return "unknown_outcome"
	}
	return "internal"
}
