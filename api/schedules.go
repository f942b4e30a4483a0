package api

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"

	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// schedulePrefix is put in front of a schedule's name in Temporal.
const schedulePrefix = "orrery/"

var (
	scheduleName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$`)
	cronField    = regexp.MustCompile(`^[A-Za-z0-9*,/-]+$`)
)

// catchUp bounds how late a run is started after an outage; Temporal's own default is a year.
const catchUp = time.Hour

// action is what a schedule starts.
func (s *Server) action(ctx context.Context, r NewSchedule) (*client.ScheduleWorkflowAction, error) {
	a := &client.ScheduleWorkflowAction{TaskQueue: workflows.LifecycleQueue}
	model := value(r.Model)
	if r.Kind != Retention {
		if _, err := s.store.Model(ctx, model); err != nil {
			return nil, err
		}
		if err := permit(caller(ctx), registry.Deployer, model); err != nil {
			return nil, err
		}
	}
	switch r.Kind {
	case Batch:
		in, err := batchInput(model, value(r.Batch), actor(ctx))
		if err != nil {
			return nil, err
		}
		a.ID, a.Workflow, a.Args = workflows.BatchScoreID(r.Name), workflows.BatchScoreName, []any{in}
		a.TypedSearchAttributes = workflows.Attributes(registry.KindBatch, model, in.Version, in.Actor, "")
	case Drift:
		in, err := driftInput(model, value(r.Drift), actor(ctx))
		if err != nil {
			return nil, err
		}
		in.Until = time.Time{}
		a.ID, a.Workflow, a.Args = workflows.DriftCheckID(model, r.Name), workflows.DriftCheckName, []any{in}
		a.TypedSearchAttributes = workflows.Attributes(registry.KindDrift, model, 0, in.Actor, "")
	case Retention:
		a.ID, a.Workflow, a.Args = workflows.RetentionID, workflows.RetentionName, []any{workflows.DefaultRetention()}
		a.TypedSearchAttributes = workflows.Attributes(registry.KindRetention, "", 0, actor(ctx), "")
	default:
		return nil, registry.Errorf(registry.Invalid, "kind %q: want batch, drift or retention", r.Kind)
	}
	return a, nil
}

// checkCron returns an Invalid error unless line has five fields of cron's characters; what they mean, Temporal checks.
func checkCron(line string) error {
	fields := strings.Fields(line)
	if len(fields) != 5 {
		return registry.Errorf(registry.Invalid, "cron line %q has %d fields; want five: minute hour day month weekday", line, len(fields))
	}
	for i, f := range fields {
		if !cronField.MatchString(f) {
			return registry.Errorf(registry.Invalid, "cron line %q: field %d, %q, is malformed", line, i+1, f)
		}
	}
	return nil
}

// CreateSchedule implements the API.
func (s *Server) CreateSchedule(ctx context.Context, r CreateScheduleRequestObject) (CreateScheduleResponseObject, error) {
	if !scheduleName.MatchString(r.Body.Name) {
		return nil, registry.Errorf(registry.Invalid, "schedule name %q: use letters, digits, dots, dashes and underscores", r.Body.Name)
	}
	if err := checkCron(r.Body.Cron); err != nil {
		return nil, err
	}
	if _, err := time.LoadLocation(value(r.Body.TimeZone)); err != nil {
		return nil, registry.Errorf(registry.Invalid, "time_zone %q is not known", value(r.Body.TimeZone))
	}
	a, err := s.action(ctx, *r.Body)
	if err != nil {
		return nil, err
	}
	if err := s.pingTemporal(ctx); err != nil {
		return nil, err
	}
	_, err = s.temporal.ScheduleClient().Create(ctx, client.ScheduleOptions{
		ID: schedulePrefix + r.Body.Name, Action: a, Overlap: enums.SCHEDULE_OVERLAP_POLICY_SKIP, CatchupWindow: catchUp,
		Spec: client.ScheduleSpec{CronExpressions: []string{r.Body.Cron}, TimeZoneName: value(r.Body.TimeZone)},
		Memo: map[string]any{"kind": string(r.Body.Kind), "model": value(r.Body.Model), "cron": r.Body.Cron},
	})
	var refused *serviceerror.InvalidArgument
	switch {
	case errors.Is(err, temporal.ErrScheduleAlreadyRunning):
		return nil, registry.Errorf(registry.Exists, "schedule %q exists already", r.Body.Name)
	case errors.As(err, &refused):
		return nil, registry.Errorf(registry.Invalid, "cron line %q: %s", r.Body.Cron, refused.Message)
	case err != nil:
		return nil, registry.Errorf(registry.Unavailable, "Temporal: %w", err)
	}
	return CreateSchedule201JSONResponse{Name: r.Body.Name, Kind: string(r.Body.Kind), Model: value(r.Body.Model), Cron: r.Body.Cron}, nil
}

// ListSchedules implements the API.
func (s *Server) ListSchedules(ctx context.Context, _ ListSchedulesRequestObject) (ListSchedulesResponseObject, error) {
	if err := s.pingTemporal(ctx); err != nil {
		return nil, err
	}
	list, err := s.temporal.ScheduleClient().List(ctx, client.ScheduleListOptions{PageSize: 200})
	if err != nil {
		return nil, registry.Errorf(registry.Unavailable, "Temporal: %w", err)
	}
	out := ListSchedules200JSONResponse{}
	for list.HasNext() {
		entry, err := list.Next()
		if err != nil {
			return nil, registry.Errorf(registry.Unavailable, "Temporal: %w", err)
		}
		name, ours := strings.CutPrefix(entry.ID, schedulePrefix)
		if !ours {
			continue
		}
		dto, err := s.scheduleDTO(ctx, name)
		if err != nil {
			return nil, err
		}
		if dto.Model == "" || caller(ctx).Covers(dto.Model) {
			out = append(out, dto)
		}
	}
	return out, nil
}

func (s *Server) scheduleDTO(ctx context.Context, name string) (Schedule, error) {
	d, err := s.temporal.ScheduleClient().GetHandle(ctx, schedulePrefix+name).Describe(ctx)
	if err != nil {
		return Schedule{}, scheduleFault(err, name)
	}
	out := Schedule{Name: name, Paused: d.Schedule.State.Paused, Running: len(d.Info.RunningWorkflows), Missed: d.Info.NumActionsMissedCatchupWindow}
	for field, into := range map[string]*string{"kind": &out.Kind, "model": &out.Model, "cron": &out.Cron} {
		if p, ok := d.Memo.GetFields()[field]; ok {
			*into = strings.Trim(string(p.GetData()), `"`)
		}
	}
	if len(d.Info.NextActionTimes) > 0 {
		out.Next = &d.Info.NextActionTimes[0]
	}
	if n := len(d.Info.RecentActions); n > 0 && d.Info.RecentActions[n-1].StartWorkflowResult != nil {
		out.LastWorkflow = &d.Info.RecentActions[n-1].StartWorkflowResult.WorkflowID
	}
	return out, nil
}

func scheduleFault(err error, name string) error {
	if _, ok := errors.AsType[*serviceerror.NotFound](err); ok {
		return registry.Errorf(registry.NotFound, "no schedule %q", name)
	}
	return registry.Errorf(registry.Unavailable, "Temporal: %w", err)
}

// DeleteSchedule implements the API.
func (s *Server) DeleteSchedule(ctx context.Context, r DeleteScheduleRequestObject) (DeleteScheduleResponseObject, error) {
	if err := s.temporal.ScheduleClient().GetHandle(ctx, schedulePrefix+r.Schedule).Delete(ctx); err != nil {
		return nil, scheduleFault(err, r.Schedule)
	}
	return DeleteSchedule204Response{}, nil
}

// TriggerSchedule implements the API.
func (s *Server) TriggerSchedule(ctx context.Context, r TriggerScheduleRequestObject) (TriggerScheduleResponseObject, error) {
	handle := s.temporal.ScheduleClient().GetHandle(ctx, schedulePrefix+r.Schedule)
	var err error
	if r.Body.From == nil {
		err = handle.Trigger(ctx, client.ScheduleTriggerOptions{Overlap: enums.SCHEDULE_OVERLAP_POLICY_ALLOW_ALL})
	} else {
		to := time.Now()
		if r.Body.To != nil {
			to = *r.Body.To
		}
		err = handle.Backfill(ctx, client.ScheduleBackfillOptions{Backfill: []client.ScheduleBackfill{
			{Start: *r.Body.From, End: to, Overlap: enums.SCHEDULE_OVERLAP_POLICY_ALLOW_ALL},
		}})
	}
	if err != nil {
		return nil, scheduleFault(err, r.Schedule)
	}
	return TriggerSchedule204Response{}, nil
}

// TriggerRetrain implements the API.
func (s *Server) TriggerRetrain(ctx context.Context, r TriggerRetrainRequestObject) (TriggerRetrainResponseObject, error) {
	m, err := s.store.Model(ctx, r.Model)
	if err != nil {
		return nil, err
	}
	if m.Retrain.Trainer == "" {
		return nil, registry.Errorf(registry.Precondition, "model %s has no trainer: set retrain.trainer", r.Model)
	}
	if err := s.pingTemporal(ctx); err != nil {
		return nil, err
	}
	id, signal, trigger, workflow, in := workflows.ManualTrigger(r.Model, actor(ctx), value(r.Body.Reason))
	_, err = s.temporal.SignalWithStartWorkflow(ctx, id, signal, trigger, client.StartWorkflowOptions{
		ID: id, TaskQueue: workflows.LifecycleQueue, StaticSummary: "retrain policy of " + r.Model,
	}, workflow, in)
	if err != nil {
		return nil, registry.Errorf(registry.Unavailable, "Temporal: %w", err)
	}
	return TriggerRetrain204Response{}, nil
}
