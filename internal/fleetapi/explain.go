package fleetapi

import (
	"net/http"
)

func (h *Handler) explain(r *http.Request) (any, error) {
	return nil, fail(http.StatusInternalServerError, "", "not there yet")
}
func (h *Handler) getRebalance(r *http.Request) (any, error) {
	return nil, fail(http.StatusInternalServerError, "", "not there yet")
}
func (h *Handler) postRebalance(r *http.Request) (any, error) {
	return nil, fail(http.StatusInternalServerError, "", "not there yet")
}
