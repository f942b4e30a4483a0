package webhook

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	cloudevents "github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
)

// receiver is a webhook's address: it checks signatures as its users would, and fails when told to.
type receiver struct {
	t      *testing.T
	server *httptest.Server

	mu     sync.Mutex
	secret string
	fail   int // so many requests
	got    []int64
	texts  []string
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{t: t}
	r.server = httptest.NewServer(http.HandlerFunc(r.take))
	t.Cleanup(r.server.Close)
	return r
}

func (r *receiver) take(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	body, err := io.ReadAll(q.Body)
	if err != nil {
		r.t.Error(err)
	}
	verifier, err := standardwebhooks.NewWebhook(r.secret)
	if err != nil || verifier.Verify(body, q.Header) != nil {
		r.t.Errorf("the signature of %s does not verify", body)
	}
	if r.fail > 0 {
		r.fail--
		http.Error(w, "not now", http.StatusServiceUnavailable)
		return
	}
	number, err := strconv.ParseInt(q.Header.Get("Webhook-Id"), 10, 64)
	if err != nil {
		r.t.Error(err)
	}
	r.got = append(r.got, number)
	r.texts = append(r.texts, string(body))
}

func (r *receiver) numbers() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]int64(nil), r.got...)
}

func openStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), "sqlite:"+filepath.Join(t.TempDir(), "r.db"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func model(t *testing.T, s *store.Store, name string) {
	t.Helper()
	_, err := s.CreateModel(t.Context(), registry.Model{
		Name: name, Config: registry.DefaultServingConfig(), Retrain: registry.DefaultRetrainPolicy(), Rollout: registry.DefaultRolloutPolicy(), CreatedBy: "ann",
	})
	require.NoError(t, err)
}

// run runs senders as two servers would, until the test ends.
func run(t *testing.T, s *store.Store) {
	t.Helper()
	for range 2 {
		sender := NewSender(s, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
		sender.first = 10 * time.Millisecond
		done := make(chan struct{})
		ctx := t.Context()
		go func() { defer close(done); _ = sender.Run(ctx) }() // ends with the test's context
		t.Cleanup(func() { <-done })
	}
}

func TestSender_SendsEachEventInOrderUntilItIsTaken(t *testing.T) {
	t.Parallel()
	s, r := openStore(t), newReceiver(t)
	model(t, s, "before")
	w, err := s.CreateWebhook(t.Context(), registry.Webhook{ID: "w", URL: r.server.URL, Secret: NewSecret(), Format: registry.CloudEvents, Types: []string{"model.*"}})
	require.NoError(t, err)
	r.secret, r.fail = w.Secret, 2
	run(t, s)
	for _, name := range []string{"a", "b", "c"} {
		model(t, s, name)
	}
	require.Eventually(t, func() bool { return len(r.numbers()) == 3 }, 20*time.Second, 10*time.Millisecond)
	require.Equal(t, []int64{3, 4, 5}, r.numbers(), "in order, once, and none from before; 2 is the webhook's own")

	var e cloudevents.Event
	require.NoError(t, json.Unmarshal([]byte(r.texts[0]), &e))
	require.NoError(t, e.Validate())
	require.Equal(t, "io.orrery.model.created", e.Type())
	require.Equal(t, "models/a", e.Subject())
	var inner registry.Event
	require.NoError(t, e.DataAs(&inner))
	require.EqualValues(t, 3, inner.Number)

	log, err := s.Deliveries(t.Context(), "w", 10)
	require.NoError(t, err)
	require.Len(t, log, 5)
	first := log[4]
	require.Equal(t, []any{int64(3), 1, 503, "503 Service Unavailable: not now"}, []any{first.Event, first.Attempt, first.Status, first.Error})

	require.NoError(t, s.RewindWebhook(t.Context(), "w", 0))
	require.Eventually(t, func() bool { return len(r.numbers()) == 7 }, 20*time.Second, 10*time.Millisecond)
	require.Equal(t, []int64{1, 3, 4, 5}, r.numbers()[3:], "replayed from the first event")
}

func TestSender_SaysToSlackWhatPeopleWantToKnow(t *testing.T) {
	t.Parallel()
	s, r := openStore(t), newReceiver(t)
	w, err := s.CreateWebhook(t.Context(), registry.Webhook{ID: "w", URL: r.server.URL, Secret: NewSecret(), Format: registry.Slack, Models: []string{"m"}})
	require.NoError(t, err)
	r.secret = w.Secret
	run(t, s)
	model(t, s, "m")
	for _, name := range []string{"m", "other"} {
		_, err = s.InsertRun(t.Context(), registry.Run{ID: "r-" + name, Kind: registry.KindRollout, Model: name, Version: 2, Actor: "ann"})
		require.NoError(t, err)
	}
	phase, why := "step 1 of 2: 10 %", "the candidate errs more often"
	for _, u := range []registry.RunUpdate{
		{ID: "r-m", State: registry.RunRunning, Phase: &phase}, {ID: "r-m", State: registry.RunFailed, Outcome: registry.RolledBack, Message: &why},
	} {
		_, err = s.UpdateRun(t.Context(), u)
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return len(r.numbers()) == 2 }, 20*time.Second, 10*time.Millisecond)
	require.JSONEq(t, `{"text":"m: rollout of version 2 started by ann (run r-m)"}`, r.texts[0])
	require.JSONEq(t, `{"text":"m: rollout of version 2 ended ROLLED_BACK: the candidate errs more often (run r-m)"}`, r.texts[1])
}

func TestWebhook_Validate(t *testing.T) {
	t.Parallel()
	s := openStore(t)
	for _, w := range []registry.Webhook{
		{URL: "ftp://x", Format: registry.Slack},
		{URL: "http://", Format: registry.Slack},
		{URL: "http://x", Format: "smoke"},
		{URL: "http://x", Format: registry.Slack, Types: []string{""}},
	} {
		_, err := s.CreateWebhook(t.Context(), w)
		require.Equal(t, registry.Invalid, registry.CodeOf(err), "%+v", w)
	}
	require.Equal(t, registry.NotFound, registry.CodeOf(s.DeleteWebhook(t.Context(), "w", "ann")))
	require.Equal(t, registry.NotFound, registry.CodeOf(s.RewindWebhook(t.Context(), "w", 1)))
	_, err := s.Deliveries(t.Context(), "w", 1)
	require.Equal(t, registry.NotFound, registry.CodeOf(err))
}
