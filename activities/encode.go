package activities

import "encoding/json"

// marshal writes a plain struct as JSON; those of this package always marshal.
func marshal(v any) json.RawMessage {
	raw, err := json.Marshal(v)
	if err != nil {
		return json.RawMessage(`null`)
	}
	return raw
}
