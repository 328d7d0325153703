package api

import (
	"errors"
	"net/http"

	"flotilla/internal/client"
	"flotilla/internal/store"
)

// removeMember takes a member out of the store for good.
func (s *Server) removeMember(r *http.Request) (any, error) {
	err := s.Store.RemoveMember(r.Context(), r.PathValue("member"))
	switch {
	case errors.Is(err, store.ErrNoMember):
		return nil, client.Errorf(client.CodeNotFound, "flotilla nodes list", "%v", err)
	case errors.Is(err, store.ErrUnhealthy):
		return nil, client.Errorf(client.CodeConflict, "run it again in some seconds", "%v", err)
	}
	return struct{}{}, err
}
