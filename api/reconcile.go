package api

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"

	"github.com/orrery-ml/orrery/registry"
)

const (
	reconcileEvery = 2 * time.Second
	startGrace     = 10 * time.Second // a PENDING run this old was not started by who inserted it
	reapAtOnce     = 50               // workflows looked up in one turn; with more open runs each waits its turn
	lookLimit      = 5 * time.Second  // of a turn's dealings with Temporal, which may be away
	reapGrace      = 5 * time.Second  // a run this old whose workflow is gone will not write its end any more
)

// Reconcile starts, until ctx ends, runs that were inserted and never started, and reaps runs whose workflow was
// terminated: they are marked, and arms they own are reverted. Every server may run it: each effect is idempotent.
func (s *Server) Reconcile(ctx context.Context) error {
	ticker := time.NewTicker(reconcileEvery)
	defer ticker.Stop()
	for last := ""; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		var err error
		if last, err = s.reconcileOnce(ctx, last); err != nil && ctx.Err() == nil {
			s.log.Warn("reconcile", "error", err)
		}
	}
}

// reconcileOnce looks up the workflows of the open runs after the last one that was looked up, and returns the last.
func (s *Server) reconcileOnce(ctx context.Context, last string) (string, error) {
	open, err := s.openRuns(ctx)
	if err != nil {
		return last, err
	}
	looking, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	var begun []registry.Run
	var errs []error // of one run; the others go on
	for _, run := range open {
		age := time.Since(run.CreatedAt)
		switch {
		case run.State == registry.RunPending && run.Parent != "":
			errs = append(errs, s.reapIfOrphan(ctx, run))
		case run.State == registry.RunPending && age > startGrace:
			s.start(looking, run)
		case run.State != registry.RunPending && age > reapGrace && workflowID(run) != "":
			begun = append(begun, run)
		}
	}
	begun, last = turn(begun, last, reapAtOnce)
	for i := 0; i < len(begun) && looking.Err() == nil; i++ {
		errs = append(errs, s.reapIfGone(looking, begun[i]))
	}
	return last, errors.Join(append(errs, s.reapOrphans(ctx))...)
}

// openRuns lists all runs that have not ended.
func (s *Server) openRuns(ctx context.Context) (open []registry.Run, err error) {
	const page = 1000
	for after := ""; ; {
		list, err := s.store.ListRuns(ctx, registry.RunFilter{Open: true, After: after, Limit: page})
		if err != nil {
			return nil, err
		}
		if open = append(open, list...); len(list) < page {
			return open, nil
		}
		after = list[page-1].ID
	}
}

// turn returns up to n runs in order of id, those after the last first, and the id of the last of them.
func turn(runs []registry.Run, last string, n int) (next []registry.Run, end string) {
	slices.SortFunc(runs, func(a, b registry.Run) int { return strings.Compare(a.ID, b.ID) })
	i, there := slices.BinarySearchFunc(runs, last, func(r registry.Run, id string) int { return strings.Compare(r.ID, id) })
	if there {
		i++
	}
	next = slices.Concat(runs[i:], runs[:i])
	next = next[:min(n, len(next))]
	if len(next) > 0 {
		last = next[len(next)-1].ID
	}
	return next, last
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
	routes, err := s.store.OwnedRoutes(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range routes {
		run, err := s.store.Run(ctx, r.Owner)
		if err != nil || !run.State.Ended() {
			continue
		}
		_, err = s.store.SetRoute(ctx, registry.RouteChange{
			ChangeID: r.Owner + "/reap", Model: r.Model, Expected: r.Revision, Arms: registry.StableOnly(r.StableVersion()),
			Take: true, Actor: "reaper", Reason: "run " + r.Owner + " ended and left its arms: " + string(run.Outcome),
		})
		if err != nil {
			if registry.CodeOf(err) != registry.Conflict {
				errs = append(errs, err)
			}
			continue
		}
		s.log.Info("reverted the arms of a run that ended", "model", r.Model, "run", r.Owner)
	}
	return errors.Join(errs...)
}
