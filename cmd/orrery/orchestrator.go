package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.yaml.in/yaml/v3"

	"github.com/orrery-ml/orrery/activities"
	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/internal/build"
	"github.com/orrery-ml/orrery/internal/supervisor"
	"github.com/orrery-ml/orrery/internal/toolpath"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/store"
	"github.com/orrery-ml/orrery/workflows"
)

type orchestratorOptions struct {
	backends

	queues     []string
	scratch    string
	config     string
	deployment string
}

const (
	maxActivities = 2000 // at once in one process; a bake is one
	maxPollers    = 32   // of each kind

	heartbeatEvery = 3 * time.Second // an activity that was cancelled hears of it this late at most
)

// queueNames maps the names of --queues to task queues.
var queueNames = map[string]string{"lifecycle": workflows.LifecycleQueue, "data": workflows.DataQueue, "train": workflows.TrainQueue}

func (p *program) orchestratorCommand() *cobra.Command {
	var o orchestratorOptions
	c := &cobra.Command{
		Use: "orchestrator", Short: "Run workflows and activities", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := p.fromEnvironment(c.Flags()); err != nil {
				return err
			}
			log, err := p.logger(o.logLevel)
			if err != nil {
				return err
			}
			return p.orchestrate(c.Context(), o, log)
		},
	}
	f := c.PersistentFlags()
	o.flags(p, f, "registry", "store", "temporal")
	f.StringSliceVar(&o.queues, "queues", []string{"lifecycle", "data", "train"}, "what this process does: lifecycle, data, train; data and train run in child processes of lifecycle")
	f.StringVar(&o.deployment, "deployment", "orrery", "name of the Temporal worker deployment, of which each build is a version; empty turns versioning off (ORRERY_DEPLOYMENT)")
	f.StringVar(&o.config, "config", "", "YAML file with the trainers (ORRERY_CONFIG)")
	f.StringVar(&o.scratch, "scratch", os.TempDir(), "directory for temporary files")
	c.AddCommand(p.promoteCommand(&o))
	return c
}

// orchestrate runs one queue in this process and the others in child processes of it, so that native code and trainers
// never run beside lifecycle workflows.
func (p *program) orchestrate(ctx context.Context, o orchestratorOptions, log *slog.Logger) error {
	for _, q := range o.queues {
		if queueNames[q] == "" {
			return &exitError{exitUsage, fmt.Errorf("--queues %q: want lifecycle, data or train", q)}
		}
	}
	if len(o.queues) == 0 {
		return &exitError{exitUsage, errors.New("--queues: name at least one of lifecycle, data, train")}
	}
	var group supervisor.Group
	if len(o.queues) > 1 {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		var children []supervisor.Child
		for _, q := range o.queues[1:] {
			children = append(children, supervisor.Child{
				Name: "orchestrator " + q, Log: p.stderr,
				Args: []string{
					self, "orchestrator", "--queues", q, "--scratch", o.scratch, "--config", o.config, "--log-level", o.logLevel, "--registry", o.registry,
					"--store", o.store, "--temporal", o.temporal, "--namespace", o.namespace, "--deployment", o.deployment,
				},
			})
		}
		group.Add("children", func(ctx context.Context) error { return supervisor.Run(ctx, log, children...) })
	}
	group.Add("queue "+o.queues[0], func(ctx context.Context) error { return p.work(ctx, o, queueNames[o.queues[0]], log) })
	return group.Run(ctx)
}

// work polls one task queue until ctx ends.
func (p *program) work(ctx context.Context, o orchestratorOptions, queue string, log *slog.Logger) error {
	s, err := o.openRegistry(ctx, log)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }() // nothing is written any more
	objects, err := o.openStore(ctx, log)
	if err != nil {
		return err
	}
	dialed, err := o.openTemporal(log)
	if err != nil {
		return err
	}
	defer dialed.Close()
	if err := ensureSearchAttributes(ctx, dialed, o.namespace, log); err != nil {
		return nil // asked to stop while waiting
	}
	fresh, err := workerMaker(dialed, queue, s, objects, o, log)
	if err != nil {
		return err
	}
	var once sync.Once
	var setUp sync.WaitGroup
	defer setUp.Wait()
	for ctx.Err() == nil {
		err := pollQueue(ctx, fresh, func() {
			log.Info("polling", "queue", queue, "build", build.ID())
			once.Do(func() { setUpQueue(ctx, &setUp, dialed, queue, o.deployment, log) })
		})
		if err != nil {
			log.Warn("polling ended; it begins again", "queue", queue, "error", err)
			_ = pause(ctx, pollAgain) // ctx is looked at anyway
		}
	}
	return nil
}

// setUpQueue begins what is done once when a queue is polled first.
func setUpQueue(ctx context.Context, tasks *sync.WaitGroup, c client.Client, queue, deployment string, log *slog.Logger) {
	if queue != workflows.LifecycleQueue {
		return
	}
	tasks.Go(func() { keepRetention(ctx, c, log) })
	if deployment != "" {
		tasks.Go(func() { becomeCurrent(ctx, c, deployment, log) })
	}
}

// pollAgain is how long an orchestrator that cannot poll waits before it tries again.
const pollAgain = time.Second

// pollQueue polls with a worker of its own until ctx ends: one that failed to start, or that Temporal turned away, never
// polls again. It calls polling once it polls.
func pollQueue(ctx context.Context, fresh func(fatal func(error)) worker.Worker, polling func()) error {
	ended := make(chan error, 1)
	w := fresh(func(err error) {
		select {
		case ended <- err:
		default: // one is enough
		}
	})
	defer w.Stop()
	if err := w.Start(); err != nil {
		return err
	}
	polling()
	select {
	case <-ctx.Done():
		return nil
	case err := <-ended:
		return err
	}
}

// workerMaker returns how to make workers of a queue, which share all that they need. A worker calls fatal when Temporal
// turns it away for good.
func workerMaker(c client.Client, queue string, s *store.Store, objects registry.Objects, o orchestratorOptions, log *slog.Logger) (func(fatal func(error)) worker.Worker, error) {
	trainers, err := readTrainers(o.config)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// Two pollers, the default, starve workflows that are waited for at one of the two queues when hundreds begin at once.
	pollers := worker.NewPollerBehaviorAutoscaling(worker.PollerBehaviorAutoscalingOptions{MinimumNumberOfPollers: 4, MaximumNumberOfPollers: maxPollers})
	options := worker.Options{
		WorkerStopTimeout: 10 * time.Second, MaxConcurrentActivityExecutionSize: maxActivities, WorkflowTaskPollerBehavior: pollers, ActivityTaskPollerBehavior: pollers,
		MaxHeartbeatThrottleInterval: heartbeatEvery,
	}
	if o.deployment != "" {
		options.DeploymentOptions = versioned(o.deployment)
	}
	try := []string{self, "try-model"}
	if library, err := toolpath.OnnxRuntime(o.ort); err == nil { // else the child says what is missing
		try = append(try, "--onnxruntime", library)
	}
	traffic := activities.NewTraffic(s, objects)
	models, runs, retention := activities.NewModels(s, objects, o.scratch, try), activities.NewRuns(s), activities.NewRetention(s, objects)
	var runtime engine.Runtime
	if queue == workflows.DataQueue { // native code runs in the data process only
		if runtime, err = o.startOnnx(); err != nil {
			log.Warn("this process can score nothing", "error", err)
		}
	}
	data := activities.NewData(s, objects, runtime, o.scratch)
	training := activities.NewTraining(data, c, trainers)
	return func(fatal func(error)) worker.Worker {
		options := options
		options.OnFatalError = fatal
		w := worker.New(c, queue, options)
		for _, a := range []any{models, runs, traffic, retention, data, training} {
			w.RegisterActivity(a)
		}
		if queue == workflows.LifecycleQueue {
			workflows.Register(w)
		}
		return w
	}, nil
}

// orchestratorConfig is the orchestrator's configuration file.
type orchestratorConfig struct {
	Trainers map[string]activities.Trainer `yaml:"trainers"`
}

// readTrainers reads the configuration file; "" is none. It names every fault.
func readTrainers(path string) (map[string]activities.Trainer, error) {
	if path == "" {
		return nil, nil //nolint:nilnil // no trainers
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, &exitError{exitUsage, fmt.Errorf("--config: %w", err)}
	}
	var c orchestratorConfig
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	if err := d.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return nil, &exitError{exitUsage, fmt.Errorf("--config %s: %w", path, err)}
	}
	var faults []error
	for name, t := range c.Trainers {
		if len(t.Command) == 0 {
			faults = append(faults, fmt.Errorf("trainer %q has no command", name))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, &exitError{exitUsage, fmt.Errorf("--config %s: %w", path, err)}
	}
	return c.Trainers, nil
}

// keepRetention ensures that there is a schedule of Retention, as soon as Temporal answers.
func keepRetention(ctx context.Context, c client.Client, log *slog.Logger) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		err := ensureRetention(ctx, c)
		if err == nil {
			return
		}
		if attempt%20 == 0 {
			log.Warn("make the retention schedule", "error", err)
		}
		_ = pause(ctx, pollAgain) // ctx is looked at anyway
	}
}

// ensureRetention makes the schedule of Retention, every night at four, unless there is one.
func ensureRetention(ctx context.Context, c client.Client) error {
	_, err := c.ScheduleClient().Create(ctx, client.ScheduleOptions{
		ID: workflows.RetentionScheduleID, Overlap: enums.SCHEDULE_OVERLAP_POLICY_SKIP, CatchupWindow: time.Hour,
		Spec: client.ScheduleSpec{CronExpressions: []string{"0 4 * * *"}},
		Memo: map[string]any{"kind": string(registry.KindRetention), "model": "", "cron": "0 4 * * *"},
		Action: &client.ScheduleWorkflowAction{
			ID: workflows.RetentionID, Workflow: workflows.RetentionName, TaskQueue: workflows.LifecycleQueue,
			Args: []any{workflows.DefaultRetention()},
		},
	})
	if errors.Is(err, temporal.ErrScheduleAlreadyRunning) {
		return nil
	}
	return err
}
