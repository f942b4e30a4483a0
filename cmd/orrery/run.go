package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/orrery-ml/orrery/internal/build"
)

// Exit codes, for scripts.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnavailable = 5
	exitNotPromoted = 6
	exitInterrupted = 130 // as a shell says of SIGINT
)

// exitError carries an exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// program is what every command shares.
type program struct {
	getenv func(string) string
	stdout io.Writer
	stderr io.Writer
}

// collectLess makes the garbage collector of a serving role wait longer: its live heap is a few megabytes, and to collect
// whenever that doubles costs more than the memory is worth. GOGC in the environment has the last word.
func (p *program) collectLess() {
	if p.getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	p := &program{getenv: getenv, stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use: "orrery", Short: "Every step of a model's life as a durable workflow, and the serving to go with it",
		Version: build.Version(), SilenceErrors: true, SilenceUsage: true,
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitUsage, err} })
	root.AddGroup(&cobra.Group{ID: "roles", Title: "Roles:"}, &cobra.Group{ID: "client", Title: "Client:"})
	for _, c := range []*cobra.Command{p.devCommand(), p.serverCommand(), p.orchestratorCommand(), p.workerCommand(), p.simulateCommand()} {
		c.GroupID = "roles"
		root.AddCommand(c)
	}
	root.AddCommand(p.tryCommand())
	p.addClient(root)
	started := false
	root.PersistentPreRun = func(*cobra.Command, []string) { started = true }
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if !started { // an unknown command or the wrong number of arguments
		err = &exitError{exitUsage, err}
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		fmt.Fprintln(stderr, "orrery: interrupted; what was started goes on")
		return exitInterrupted
	}
	fmt.Fprintln(stderr, "orrery:", err)
	if e, ok := errors.AsType[*exitError](err); ok {
		return e.code
	}
	return exitFailed
}

func (p *program) logger(level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, &exitError{exitUsage, fmt.Errorf("--log-level %q: want debug, info, warn or error", level)}
	}
	return slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: l})), nil
}

// envFlags sets flags that were not given from the environment: --registry from ORRERY_REGISTRY.
func (p *program) envFlags(flags *pflag.FlagSet, names map[string]string) error {
	var errs []error
	for flag, variable := range names {
		if v := p.getenv(variable); v != "" && !flags.Changed(flag) {
			if err := flags.Set(flag, v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", variable, err))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return &exitError{exitUsage, err}
	}
	return nil
}
