// Package wire is what a node's API takes and answers: requests, answers and
// errors as Go types. The components of a node use these types themselves, so
// that nothing is copied from one into another. It knows the problems and holds
// of the catalog and what can be wanted of a unit; it must not know who serves
// it, who asks, nor how it is shown to people.
//
// In JSON "node" is the name of a node and "node_id" its ID; where a node is an
// object, they are its "name" and "id". Of a node that is away only the ID is
// known.
package wire

import (
	"fmt"
	"net/http"
)

// Code says in one word what kind of error an answer is.
type Code string

// The codes of errors.
const (
	CodeBadRequest       Code = "bad_request"       // 400: the request itself is malformed
	CodeForbidden        Code = "forbidden"         // 403: it is only for others
	CodeNotFound         Code = "not_found"         // 404
	CodeNotAllowed       Code = "not_allowed"       // 405: the path takes another method
	CodeConflict         Code = "conflict"          // 409: somebody else holds it, or changed it meanwhile, or it cannot be done now
	CodeTooLarge         Code = "too_large"         // 413: the request's body
	CodeInvalid          Code = "invalid"           // 422: the catalog would refuse a value
	CodeInternal         Code = "internal"          // 500
	CodeUnavailable      Code = "unavailable"       // 503: the node cannot answer now
	CodeStoreUnavailable Code = "store_unavailable" // 503: the store does not answer; nothing was written
	CodeUnknown          Code = "unknown_outcome"   // 504: it is not known whether the write was done
	CodeNotConverged     Code = "not_converged"     // 504: some node has not applied the revision in time
)

var statusOf = map[Code]int{
	CodeBadRequest: http.StatusBadRequest, CodeForbidden: http.StatusForbidden, CodeNotFound: http.StatusNotFound,
	CodeNotAllowed: http.StatusMethodNotAllowed, CodeConflict: http.StatusConflict, CodeTooLarge: http.StatusRequestEntityTooLarge,
	CodeInvalid: http.StatusUnprocessableEntity, CodeInternal: http.StatusInternalServerError, CodeUnavailable: http.StatusServiceUnavailable,
	CodeStoreUnavailable: http.StatusServiceUnavailable, CodeUnknown: http.StatusGatewayTimeout, CodeNotConverged: http.StatusGatewayTimeout,
}

// Status returns the HTTP status of an answer with that code.
func (c Code) Status() int { return statusOf[c] }

// CodeOf returns the code of an answer with that HTTP status of which no more is
// known.
func CodeOf(status int) Code {
	for code, its := range statusOf {
		if its == status && code != CodeUnknown && code != CodeUnavailable { // which share theirs
			return code
		}
	}
	return CodeInternal
}

// Error is an error as it crosses the wire: {"error": {...}}.
type Error struct {
	Code    Code      `json:"code"`
	Message string    `json:"message"`
	Hint    string    `json:"hint,omitempty"`    // a command or a sentence that helps
	Applied []Applied `json:"applied,omitempty"` // of not_converged: every node and how far it is
	Status  int       `json:"-"`                 // of the answer, where a client got one
}

func (e *Error) Error() string { return e.Message }

// Errorf returns an error of that code; hint may be "".
func Errorf(code Code, hint, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Hint: hint}
}
