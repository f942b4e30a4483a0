package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	apiclient "github.com/orrery-ml/orrery/api/client"
	"github.com/orrery-ml/orrery/internal/testenv"
)

// A worker whose start failed never polls again, whatever comes back: each try has one of its own.
func TestPollQueue_BeginsAgain(t *testing.T) {
	t.Parallel()
	server, err := testenv.StartTemporal()
	require.NoError(t, err)
	c, err := client.NewLazyClient(client.Options{HostPort: server.Address, Logger: quietLog{}})
	require.NoError(t, err)
	defer c.Close()
	var turnAway func(error)
	fresh := func(fatal func(error)) worker.Worker {
		turnAway = fatal
		w := worker.New(c, "q", worker.Options{OnFatalError: fatal})
		w.RegisterWorkflowWithOptions(func(workflow.Context) error { return nil }, workflow.RegisterOptions{Name: "Nothing"})
		return w
	}
	server.Kill()
	require.Error(t, pollQueue(t.Context(), fresh, func() { t.Error("it polls what is not there") }))
	require.NoError(t, server.Start())

	ctx, stop := context.WithCancel(t.Context())
	polling, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			err := pollQueue(ctx, fresh, func() { close(polling) })
			select {
			case <-polling:
				ended <- err
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	<-polling
	run, err := c.ExecuteWorkflow(ctx, client.StartWorkflowOptions{TaskQueue: "q"}, "Nothing")
	require.NoError(t, err)
	require.NoError(t, run.Get(ctx, nil))
	turnAway(errors.New("turned away"))
	require.ErrorContains(t, <-ended, "turned away")

	polling = make(chan struct{})
	go func() { ended <- pollQueue(ctx, fresh, func() { close(polling) }) }()
	<-polling
	stop()
	require.NoError(t, <-ended, "it was asked to stop")
}

// Runs that nobody works on are the first thing to look for when a roll-out is stuck.
func TestStatus_SaysThatNobodyPolls(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1, 0)
	says := func(want string) {
		t.Helper()
		require.Eventually(t, func() bool {
			s, err := decode[apiclient.Status](c.api(0).GetStatus(t.Context()))
			return err == nil && strings.Contains(s.Orchestrator, want)
		}, 60*time.Second, 100*time.Millisecond, "status does not say %q", want)
	}
	says("ok")
	c.orchestrator.Kill()
	c.temporal.Kill() // it forgets who polled a minute ago
	says("Temporal does not answer")
	require.NoError(t, c.temporal.Start())
	says("nobody polls orrery-lifecycle")
	require.NoError(t, c.orchestrator.Start())
	says("ok")
}

type quietLog struct{}

func (quietLog) Debug(string, ...any) {}
func (quietLog) Info(string, ...any)  {}
func (quietLog) Warn(string, ...any)  {}
func (quietLog) Error(string, ...any) {}
