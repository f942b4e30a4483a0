package api

import (
	"context"
	"errors"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"

	"github.com/orrery-ml/orrery/registry"
)

const (
	reconcileEvery = 2 * time.Second
	startGrace     = 10 * time.Second // a PENDING run this old was not started by who inserted it
	reapGrace      = 5 * time.Second  // a run this old whose workflow is gone will not write its end any more
)

// Reconcile starts, until ctx ends, runs that were inserted and never started, and reaps runs whose workflow was
// terminated: they are marked, and arms they own are reverted. Every server may run it: each effect is idempotent.
func (s *Server) Reconcile(ctx context.Context) error {
	ticker := time.NewTicker(reconcileEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := s.reconcileOnce(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("reconcile", "error", err)
		}
	}
}

func (s *Server) reconcileOnce(ctx context.Context) error {
	open, err := s.store.ListRuns(ctx, registry.RunFilter{Open: true, Limit: 1000})
	if err != nil {
		return err
	}
	for _, run := range open {
		age := time.Since(run.CreatedAt)
		switch {
		case run.State == registry.RunPending && run.Parent != "":
			if err := s.reapIfOrphan(ctx, run); err != nil {
				return err
			}
		case run.State == registry.RunPending && age > startGrace:
			s.start(ctx, run)
		case run.State != registry.RunPending && age > reapGrace && workflowID(run) != "":
			if err := s.reapIfGone(ctx, run); err != nil {
				return err
			}
		}
	}
	return s.reapOrphans(ctx)
}

// reapIfOrphan ends a run that its parent inserted and will not start any more, because the parent has ended.
func (s *Server) reapIfOrphan(ctx context.Context, run registry.Run) error {
	parent, err := s.store.Run(ctx, run.Parent)
	if err != nil || !parent.State.Ended() || time.Since(parent.EndedAt) < reapGrace {
		return err
	}
	return s.reap(ctx, run, "run "+parent.ID+" ended before it started this one")
}

// reap marks a run whose workflow will not write its end. A version that it was registering is FAILED, not PENDING for
// ever.
func (s *Server) reap(ctx context.Context, run registry.Run, message string) error {
	if run.Kind == registry.KindRegister {
		_, err := s.store.FinishVersion(ctx, run.Model, run.Version, registry.Derived{}, message)
		if code := registry.CodeOf(err); err != nil && code != registry.Precondition && code != registry.NotFound {
			return err
		}
	}
	_, err := s.store.UpdateRun(ctx, registry.RunUpdate{ID: run.ID, State: registry.RunFailed, Outcome: registry.Terminated, Message: &message})
	return err
}

// reapIfGone ends a run whose workflow ended without saying so: it was terminated, timed out or failed.
func (s *Server) reapIfGone(ctx context.Context, run registry.Run) error {
	d, err := s.temporal.DescribeWorkflowExecution(ctx, workflowID(run), "")
	var missing *serviceerror.NotFound
	if err != nil && !errors.As(err, &missing) {
		return err
	}
	status := "gone"
	if err == nil {
		info := d.GetWorkflowExecutionInfo()
		if info.GetStatus() == enums.WORKFLOW_EXECUTION_STATUS_RUNNING || info.GetStatus() == enums.WORKFLOW_EXECUTION_STATUS_CONTINUED_AS_NEW {
			return nil
		}
		if closed := info.GetCloseTime(); closed != nil && time.Since(closed.AsTime()) < reapGrace {
			return nil
		}
		status = info.GetStatus().String()
	}
	return s.reap(ctx, run, "its workflow ended without a word: "+status)
}

// reapOrphans reverts routes whose owner has ended.
func (s *Server) reapOrphans(ctx context.Context) error {
	snap, err := s.store.Snapshot(ctx)
	if err != nil {
		return err
	}
	for _, r := range snap.Routes {
		if r.Owner == "" {
			continue
		}
		run, err := s.store.Run(ctx, r.Owner)
		if err != nil || !run.State.Ended() {
			continue
		}
		_, err = s.store.SetRoute(ctx, registry.RouteChange{
			ChangeID: r.Owner + "/reap", Model: r.Model, Expected: r.Revision, Arms: registry.StableOnly(r.StableVersion()),
			Take: true, Actor: "reaper", Reason: "run " + r.Owner + " ended and left its arms: " + string(run.Outcome),
		})
		if err != nil && registry.CodeOf(err) != registry.Conflict {
			return err
		}
		s.log.Info("reverted the arms of a run that ended", "model", r.Model, "run", r.Owner)
	}
	return nil
}
