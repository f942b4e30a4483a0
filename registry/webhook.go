package registry

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// WebhookFormat is the form in which events are sent.
type WebhookFormat string

// The formats.
const (
	CloudEvents WebhookFormat = "cloudevents" // CloudEvents 1.0, structured JSON
	Slack       WebhookFormat = "slack"       // a text, as Slack's incoming webhooks take it; events without words are left out
)

// Webhook sends events to an address, in order, each until it is taken or given up.
type Webhook struct {
	ID        string
	URL       string
	Secret    string // of the signature
	Format    WebhookFormat
	Types     []string // event types; one that ends in * stands for all that begin so; none = all
	Models    []string // none = all
	Position  int64    // number of the last event that is done with
	CreatedAt time.Time
	CreatedBy string
}

// Wants says whether the webhook is sent an event.
func (w Webhook) Wants(e Event) bool {
	typed := len(w.Types) == 0 || slices.ContainsFunc(w.Types, func(t string) bool {
		prefix, pattern := strings.CutSuffix(t, "*")
		return t == string(e.Type) || pattern && strings.HasPrefix(string(e.Type), prefix)
	})
	return typed && (len(w.Models) == 0 || slices.Contains(w.Models, e.Model))
}

// Validate returns an Invalid error that names what is wrong.
func (w Webhook) Validate() error {
	u, err := url.Parse(w.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return Errorf(Invalid, "webhook address %q: want http://… or https://…", w.URL)
	}
	if w.Format != CloudEvents && w.Format != Slack {
		return Errorf(Invalid, "webhook format %q: want cloudevents or slack", w.Format)
	}
	if slices.Contains(w.Types, "") {
		return Errorf(Invalid, "an empty event type matches nothing")
	}
	return nil
}

// Delivery is one attempt to send an event.
type Delivery struct {
	Webhook string    `json:"webhook"`
	Event   int64     `json:"event"`
	Attempt int       `json:"attempt"`
	At      time.Time `json:"at"`
	Millis  int64     `json:"ms"`
	Status  int       `json:"status"` // of the answer; 0 = there was none
	Error   string    `json:"error,omitempty"`
	GivenUp bool      `json:"given_up,omitempty"` // the last attempt: the event will not be sent again by itself
}

// Text says an event in one line for people, "" when it is none of their business.
func (e Event) Text(decode func(any) error) string {
	switch e.Type {
	case RunChanged:
		var r Run
		if decode(&r) != nil {
			return ""
		}
		return runText(r)
	case RouteChanged:
		var r Route
		if decode(&r) != nil {
			return ""
		}
		var arms []string
		for _, a := range r.Arms {
			arms = append(arms, fmt.Sprintf("version %d %s %.4g %%", a.Version, a.Role, float64(a.Weight)/100))
		}
		return fmt.Sprintf("%s: route %d by %s: %s (%s)", e.Model, r.Revision, r.Actor, strings.Join(arms, ", "), r.Reason)
	case VersionReady:
		return fmt.Sprintf("%s: version %d is ready", e.Model, e.Version)
	case VersionFailed:
		return fmt.Sprintf("%s: version %d failed", e.Model, e.Version)
	default:
		return ""
	}
}

func runText(r Run) string {
	what := fmt.Sprintf("%s: %s of version %d", r.Model, r.Kind, r.Version)
	switch {
	case r.State == RunPending:
		return fmt.Sprintf("%s started by %s (run %s)", what, r.Actor, r.ID)
	case r.State == RunWaiting, r.State == RunNeedsOperator:
		return fmt.Sprintf("%s: %s (run %s)", what, r.Phase, r.ID)
	case r.State.Ended():
		end := string(r.Outcome)
		if end == "" {
			end = string(r.State)
		}
		return fmt.Sprintf("%s ended %s: %s (run %s)", what, end, r.Message, r.ID)
	}
	return ""
}
