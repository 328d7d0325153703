package wire

import (
	"encoding/json"
	"net/http"
	"testing"
)

func TestAnswers(t *testing.T) {
	in := ServiceCounters{Service: "web", Requests: Answers{1, 0, 12, 0, 3}, Connections: 16}
	raw, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil || string(fields["requests"]) != `{"2xx":12,"4xx":3,"other":1}` {
		t.Errorf("%s, %v", raw, err)
	}
	var out ServiceCounters
	if err := json.Unmarshal(raw, &out); err != nil || out.Requests != in.Requests || out.Connections != 16 {
		t.Errorf("%+v, %v", out, err)
	}
}

// Each code has a status, and each status of an error one code.
func TestCodes(t *testing.T) {
	for _, code := range []Code{CodeBadRequest, CodeForbidden, CodeNotFound, CodeNotAllowed, CodeConflict, CodeTooLarge, CodeInvalid, CodeInternal, CodeStoreUnavailable, CodeNotConverged} {
		if got := CodeOf(code.Status()); got != code {
			t.Errorf("%s has the status %d, which is %s", code, code.Status(), got)
		}
	}
	if got := CodeOf(http.StatusTeapot); got != CodeInternal {
		t.Errorf("an unknown status is %s", got)
	}
}
