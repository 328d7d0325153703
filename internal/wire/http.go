package wire

import (
	"encoding/json"
	"net/http"
)

// Write answers with a value as JSON.
func Write(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	out := json.NewEncoder(w)
	out.SetEscapeHTML(false)
	_ = out.Encode(body) // a client that is gone does not want it
}

// WriteError answers with an error.
func WriteError(w http.ResponseWriter, e *Error) {
	Write(w, e.Code.Status(), struct {
		Error *Error `json:"error"`
	}{e})
}
