// Package webhook sends the registry's events to webhooks: in order, signed, each until it is taken or given up after
// about a day. Every server runs a Sender; a claim in the registry makes one of them send to a webhook at a time.
package webhook

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/orrery-ml/orrery/registry"
)

const (
	lookEvery   = time.Second      // for webhooks to send to
	claimLasts  = 30 * time.Second // a sender that dies is replaced after it
	idleLimit   = 2 * time.Second  // a replay is noticed after it
	sendLimit   = 10 * time.Second // of one attempt
	pageSize    = 200              // events read at once
	firstWait   = time.Second      // after the first failure; then twice as long each time
	longestWait = 10 * time.Minute
	maxAttempts = 150 // of one event: about a day
	maxBody     = 4096
)

// secretPrefix marks a secret, as Standard Webhooks does.
const secretPrefix = "whsec_"

// NewSecret returns a random secret.
func NewSecret() string {
	var raw [24]byte
	_, _ = rand.Read(raw[:]) // never fails
	return secretPrefix + base64.StdEncoding.EncodeToString(raw[:])
}

// eventLog is the part of the registry a sender uses.
type eventLog interface {
	registry.Webhooks
	Events(ctx context.Context, after int64, limit int) ([]registry.Event, error)
	Await(ctx context.Context, after int64) error
}

// Sender sends events to webhooks.
type Sender struct {
	store  eventLog
	log    *slog.Logger
	id     string
	client *http.Client
	sent   *prometheus.CounterVec
	first  time.Duration

	mu     sync.Mutex
	active map[string]bool
}

// NewSender makes a sender; Run makes it work.
func NewSender(s eventLog, r prometheus.Registerer, log *slog.Logger) *Sender {
	out := &Sender{
		store: s, log: log, id: uuid.NewString(), active: map[string]bool{}, first: firstWait,
		client: &http.Client{Timeout: sendLimit, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orrery_webhook_deliveries_total", Help: "Attempts to send an event to a webhook, by result.",
		}, []string{"result"}),
	}
	r.MustRegister(out.sent)
	return out
}

// Run sends until ctx ends.
func (s *Sender) Run(ctx context.Context) error {
	var senders sync.WaitGroup
	defer senders.Wait()
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		list, err := s.store.ListWebhooks(ctx)
		if err != nil && ctx.Err() == nil {
			s.log.Warn("list webhooks", "error", err)
		}
		for _, w := range list {
			if s.begin(w.ID) {
				senders.Go(func() {
					defer s.end(w.ID)
					if err := s.serve(ctx, w.ID); err != nil && ctx.Err() == nil {
						s.log.Warn("send to a webhook", "webhook", w.ID, "error", err)
					}
				})
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func (s *Sender) begin(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active[id] {
		return false
	}
	s.active[id] = true
	return true
}

func (s *Sender) end(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.active, id)
}

// serve sends to one webhook while this sender has it.
func (s *Sender) serve(ctx context.Context, id string) error {
	for {
		w, mine, err := s.store.ClaimWebhook(ctx, id, s.id, claimLasts)
		if err != nil || !mine {
			return err
		}
		events, err := s.store.Events(ctx, w.Position, pageSize)
		if err != nil {
			return err
		}
		if len(events) == 0 {
			waiting, cancel := context.WithTimeout(ctx, idleLimit)
			err := s.store.Await(waiting, w.Position)
			cancel()
			if ctx.Err() != nil || err != nil && !errors.Is(err, context.DeadlineExceeded) {
				return err
			}
			continue
		}
		if err := s.page(ctx, w, events); err != nil {
			return err
		}
	}
}

// page sends the events of a page, and moves the position past each that is done with.
func (s *Sender) page(ctx context.Context, w registry.Webhook, events []registry.Event) error {
	skipped := w.Position
	for _, e := range events {
		body, ok := message(w, e)
		if !ok {
			skipped = e.Number
			continue
		}
		if err := s.deliver(ctx, w, e, body); err != nil {
			return err
		}
		if err := s.store.AdvanceWebhook(ctx, w.ID, s.id, w.Position, e.Number); err != nil {
			return err
		}
		w.Position, skipped = e.Number, e.Number
		again, mine, err := s.store.ClaimWebhook(ctx, w.ID, s.id, claimLasts)
		if err != nil || !mine || again.Position != w.Position {
			return err // another one's now, deleted, or replayed from elsewhere: look anew
		}
	}
	if skipped > w.Position {
		return s.store.AdvanceWebhook(ctx, w.ID, s.id, w.Position, skipped)
	}
	return nil
}

// errLost says that the webhook is another sender's, was deleted, or is replayed.
var errLost = errors.New("the webhook is no longer this sender's")

// deliver tries until the event is taken, or gives it up. It returns an error when it may not go on.
func (s *Sender) deliver(ctx context.Context, w registry.Webhook, e registry.Event, body []byte) error {
	wait := s.first
	for attempt := 1; ; attempt++ {
		d := s.Send(ctx, w, e.Number, body)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.Attempt, d.GivenUp = attempt, d.Error != "" && attempt >= maxAttempts
		if err := s.store.AddDelivery(ctx, d); err != nil {
			return err
		}
		if d.Error == "" || d.GivenUp {
			return nil
		}
		for until := time.Now().Add(wait); ; {
			again, mine, err := s.store.ClaimWebhook(ctx, w.ID, s.id, claimLasts)
			if err != nil {
				return err
			}
			if !mine || again.Position != w.Position {
				return errLost
			}
			left := time.Until(until)
			if left <= 0 {
				break
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(min(left, claimLasts/3)):
			}
		}
		wait = min(2*wait, longestWait)
	}
}

// Send makes one attempt. An answer of 2xx takes the event.
func (s *Sender) Send(ctx context.Context, w registry.Webhook, number int64, body []byte) registry.Delivery {
	at := time.Now()
	d := registry.Delivery{Webhook: w.ID, Event: number, Attempt: 1, At: at.UTC()}
	status, err := s.post(ctx, w, number, at, body)
	d.Status, d.Millis = status, time.Since(at).Milliseconds()
	result := "ok"
	if err != nil {
		d.Error, result = err.Error(), "failed"
	}
	s.sent.WithLabelValues(result).Inc()
	return d
}

func (s *Sender) post(ctx context.Context, w registry.Webhook, number int64, at time.Time, body []byte) (int, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, w.URL, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	contentType := "application/cloudevents+json; charset=utf-8"
	if w.Format == registry.Slack {
		contentType = "application/json; charset=utf-8"
	}
	id := strconv.FormatInt(number, 10)
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("User-Agent", "orrery-webhook")
	r.Header.Set("Webhook-Id", id)
	r.Header.Set("Webhook-Timestamp", strconv.FormatInt(at.Unix(), 10))
	signer, err := standardwebhooks.NewWebhook(w.Secret)
	if err != nil {
		return 0, fmt.Errorf("secret of the webhook: %w", err)
	}
	signature, err := signer.Sign(id, at, body)
	if err != nil {
		return 0, err
	}
	r.Header.Set("Webhook-Signature", signature)
	answer, err := s.client.Do(r)
	if err != nil {
		return 0, err
	}
	defer func() { _ = answer.Body.Close() }() // read as far as wanted
	text, _ := io.ReadAll(io.LimitReader(answer.Body, maxBody))
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		return answer.StatusCode, fmt.Errorf("%s: %s", answer.Status, strings.TrimSpace(string(text[:min(len(text), 200)])))
	}
	return answer.StatusCode, nil
}

// cloudEvent is an event in the structured JSON form of CloudEvents 1.0.
type cloudEvent struct {
	SpecVersion     string          `json:"specversion"`
	ID              string          `json:"id"`
	Source          string          `json:"source"`
	Type            string          `json:"type"`
	Subject         string          `json:"subject,omitempty"`
	Time            time.Time       `json:"time"`
	DataContentType string          `json:"datacontenttype"`
	Data            json.RawMessage `json:"data"`
}

// Message returns an event as a webhook is sent it.
func Message(format registry.WebhookFormat, e registry.Event) ([]byte, bool) {
	if format == registry.Slack {
		text := e.Text(func(v any) error { return json.Unmarshal(e.Data, v) })
		body, err := json.Marshal(map[string]string{"text": text})
		return body, err == nil && text != ""
	}
	subject := ""
	if e.Model != "" {
		subject = "models/" + e.Model
		if e.Version > 0 {
			subject += fmt.Sprintf("/versions/%d", e.Version)
		}
	}
	data, err := json.Marshal(e)
	if err != nil {
		return nil, false
	}
	body, err := json.Marshal(cloudEvent{
		SpecVersion: "1.0", ID: strconv.FormatInt(e.Number, 10), Source: "urn:orrery:registry", Type: "io.orrery." + string(e.Type),
		Subject: subject, Time: e.At, DataContentType: "application/json", Data: data,
	})
	return body, err == nil
}

func message(w registry.Webhook, e registry.Event) ([]byte, bool) {
	if !w.Wants(e) {
		return nil, false
	}
	return Message(w.Format, e)
}
