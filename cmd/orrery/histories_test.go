package main

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/history/v1"
	"go.temporal.io/api/temporalproto"
	"go.temporal.io/api/workflow/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/workflows"
)

// With the value "clusters" every test of a cluster records what happened in it.
//
// TestRecordHistories writes a history of every kind of workflow and outcome that a Temporal server has, for the replay
// tests of package workflows. It runs only when told the server's address:
//
//	ORRERY_RECORD_HISTORIES=127.0.0.1:7233 go test ./cmd/orrery -run TestRecordHistories
func TestRecordHistories(t *testing.T) {
	address := os.Getenv("ORRERY_RECORD_HISTORIES")
	if address == "" || address == "clusters" {
		t.Skip("ORRERY_RECORD_HISTORIES is not set")
	}
	recordHistories(t, address)
}

func recordHistories(t *testing.T, address string) {
	t.Helper()
	c, err := client.Dial(client.Options{HostPort: address})
	require.NoError(t, err)
	defer c.Close()
	list, err := c.ListWorkflow(context.Background(), &workflowservice.ListWorkflowExecutionsRequest{PageSize: 500})
	require.NoError(t, err)
	for _, e := range list.GetExecutions() {
		h, name := fetchHistory(t, c, e)
		dir := filepath.Join("..", "..", "workflows", "testdata", "histories", e.GetType().GetName())
		require.NoError(t, os.MkdirAll(dir, 0o750))
		path := filepath.Join(dir, name+".json.gz")
		if _, err := os.Stat(path); err == nil {
			continue
		}
		raw, err := temporalproto.CustomJSONMarshalOptions{}.Marshal(h)
		require.NoError(t, err)
		f, err := os.Create(path)
		require.NoError(t, err)
		z := gzip.NewWriter(f)
		_, err = z.Write(raw)
		require.NoError(t, err)
		require.NoError(t, z.Close())
		require.NoError(t, f.Close())
		t.Log("recorded", path)
	}
}

// fetchHistory returns a history and a name that says how it came out.
func fetchHistory(t *testing.T, c client.Client, e *workflow.WorkflowExecutionInfo) (h *history.History, name string) {
	t.Helper()
	h = &history.History{}
	events := c.GetWorkflowHistory(context.Background(), e.GetExecution().GetWorkflowId(), e.GetExecution().GetRunId(), false, enums.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT)
	for events.HasNext() {
		event, err := events.Next()
		require.NoError(t, err)
		h.Events = append(h.Events, event)
	}
	name = e.GetStatus().String()
	last := h.GetEvents()[len(h.GetEvents())-1].GetWorkflowExecutionCompletedEventAttributes()
	var outcome struct {
		Outcome string `json:"outcome"`
		Status  string `json:"status"`
	}
	if p := last.GetResult().GetPayloads(); len(p) > 0 && json.Unmarshal(p[0].GetData(), &outcome) == nil {
		name += fmt.Sprintf("-%s%s", outcome.Outcome, outcome.Status)
	}
	first := h.GetEvents()[0].GetWorkflowExecutionStartedEventAttributes()
	var input struct {
		Plan struct {
			Strategy string `json:"strategy"`
		} `json:"plan"`
		Resume *json.RawMessage `json:"resume"`
	}
	if p := first.GetInput().GetPayloads(); len(p) > 0 && json.Unmarshal(p[0].GetData(), &input) == nil && input.Plan.Strategy != "" {
		name += "-" + input.Plan.Strategy
		if input.Resume != nil {
			name += "-resumed"
		}
	}
	if slices.ContainsFunc(h.GetEvents(), func(e *history.HistoryEvent) bool {
		return e.GetWorkflowExecutionUpdateAcceptedEventAttributes().GetAcceptedRequest().GetInput().GetName() == workflows.ReleaseUpdate
	}) {
		name += "-released"
	}
	return h, name + versionsOf(h)
}

// versionsOf names the changes of the workflow (GetVersion) that a history went through.
func versionsOf(h *history.History) string {
	var out strings.Builder
	for _, e := range h.GetEvents() {
		m := e.GetMarkerRecordedEventAttributes()
		var change string
		if p := m.GetDetails()["change-id"].GetPayloads(); m.GetMarkerName() == "Version" && len(p) > 0 && json.Unmarshal(p[0].GetData(), &change) == nil {
			out.WriteString("-" + change)
		}
	}
	return out.String()
}
