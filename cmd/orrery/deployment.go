package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/orrery-ml/orrery/internal/build"
)

// versioned makes a worker one version of a deployment. Workflows move to the current version with their next task;
// that every history of earlier builds still replays is what the tests of package workflows are for.
func versioned(deployment string) worker.DeploymentOptions {
	return worker.DeploymentOptions{
		UseVersioning: true, Version: worker.WorkerDeploymentVersion{DeploymentName: deployment, BuildID: build.ID()},
		DefaultVersioningBehavior: workflow.VersioningBehaviorAutoUpgrade,
	}
}

const retryCurrent = 300 * time.Millisecond

// becomeCurrent makes this build the deployment's current version, unless a later one is: while builds are exchanged
// one by one, tasks go to the new one only, and never back to one that does not know its commands.
func becomeCurrent(ctx context.Context, c client.Client, deployment string, log *slog.Logger) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		done, err := tryCurrent(ctx, c, deployment, false)
		switch {
		case err == nil && done:
			log.Info("this build is the deployment's current version", "deployment", deployment, "build", build.ID())
			return
		case err == nil:
			log.Warn("a later build is the deployment's current version, so this one gets no new work; orrery orchestrator promote goes back to it",
				"deployment", deployment, "build", build.ID())
			return
		case attempt > 0 && attempt%20 == 0: // the first attempts are too early as a rule
			log.Warn("make this build the current version", "deployment", deployment, "build", build.ID(), "error", err)
		}
		_ = pause(ctx, retryCurrent) // ctx is looked at anyway
	}
}

// tryCurrent makes this build current; without force only when no later one is.
func tryCurrent(ctx context.Context, c client.Client, deployment string, force bool) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	handle := c.WorkerDeploymentClient().GetHandle(deployment)
	d, err := handle.Describe(ctx, client.WorkerDeploymentDescribeOptions{})
	if err != nil {
		return false, err
	}
	if current := d.Info.RoutingConfig.CurrentVersion; current != nil && current.BuildID != "" {
		if current.BuildID == build.ID() {
			return true, nil
		}
		if laterBuild(current.BuildID, build.ID()) && !force {
			return false, nil
		}
	}
	_, err = handle.SetCurrentVersion(ctx, client.WorkerDeploymentSetCurrentVersionOptions{
		BuildID: build.ID(), ConflictToken: d.ConflictToken, IgnoreMissingTaskQueues: force, AllowNoPollers: force,
	})
	return err == nil, err
}

// laterBuild says whether one build's commit is later than another's. Builds of the same commit, and builds that do not
// know theirs, are none later than the other: who starts last becomes current.
func laterBuild(one, other string) bool {
	const stamp = len("20060102T150405")
	return one[:min(len(one), stamp)] > other[:min(len(other), stamp)]
}

func (p *program) promoteCommand(o *orchestratorOptions) *cobra.Command {
	return &cobra.Command{
		Use: "promote", Short: "Make this build the deployment's current version, even where a later one is", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := p.fromEnvironment(c.Flags()); err != nil {
				return err
			}
			log, err := p.logger(o.logLevel)
			if err != nil {
				return err
			}
			dialed, err := o.openTemporal(log)
			if err != nil {
				return err
			}
			defer dialed.Close()
			if _, err := tryCurrent(c.Context(), dialed, o.deployment, true); err != nil {
				return &exitError{exitUnavailable, fmt.Errorf("promote build %s: %w", build.ID(), err)}
			}
			_, err = fmt.Fprintf(p.stdout, "build %s is the current version of %s\n", build.ID(), o.deployment)
			return err
		},
	}
}
