// Package supervisor runs child processes: it decides when one is started again and how all are stopped. It knows
// nothing of what they do.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Child is a process to keep running.
type Child struct {
	Name string
	Args []string // Args[0] is the program
	Env  []string // added to the supervisor's own
	Log  io.Writer
	// Patience is how long the child gets between SIGTERM and SIGKILL; 0 = 20 s.
	Patience time.Duration
}

// spawner starts processes from one locked thread: the kernel ends a child whose parent thread dies, so that thread
// must live as long as the supervisor.
type spawner struct {
	jobs chan func()
}

func newSpawner(ctx context.Context) *spawner {
	s := &spawner{jobs: make(chan func())}
	go func() { // ends with ctx
		runtime.LockOSThread()
		for {
			select {
			case job := <-s.jobs:
				job()
			case <-ctx.Done():
				return
			}
		}
	}()
	return s
}

func (s *spawner) start(cmd *exec.Cmd) error {
	err := make(chan error, 1)
	s.jobs <- func() { err <- cmd.Start() }
	return <-err
}

// Run keeps the children running until ctx ends, then stops them in the reverse of their order and waits for all. A
// child that ends is started again, after a pause that grows while it keeps ending soon.
func Run(ctx context.Context, log *slog.Logger, children ...Child) error {
	lives, die := context.WithCancel(context.WithoutCancel(ctx))
	defer die()
	spawn := newSpawner(lives)
	stops := make([]context.CancelFunc, len(children))
	ended := make([]chan struct{}, len(children))
	for i, c := range children {
		var own context.Context
		own, stops[i] = context.WithCancel(lives)
		ended[i] = make(chan struct{})
		go func() { // waited for below
			defer close(ended[i])
			keep(own, log, spawn, c)
		}()
	}
	<-ctx.Done()
	for i, stop := range slices.Backward(stops) {
		stop()
		<-ended[i]
	}
	return nil
}

func keep(ctx context.Context, log *slog.Logger, spawn *spawner, c Child) {
	pause := 100 * time.Millisecond
	for {
		began := time.Now()
		err := once(ctx, spawn, c)
		if ctx.Err() != nil {
			return // it was asked to end, and did
		}
		log.Error("a process ended and is started again", "process", c.Name, "error", err, "pause", pause)
		if time.Since(began) > 10*time.Second {
			pause = 100 * time.Millisecond
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, 5*time.Second)
	}
}

func once(ctx context.Context, spawn *spawner, c Child) error {
	cmd := exec.Command(c.Args[0], c.Args[1:]...) //nolint:gosec,noctx // our own programs; stopped below
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	cmd.SysProcAttr = attributes()
	if err := spawn.start(cmd); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the process
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	patience := c.Patience
	if patience == 0 {
		patience = 20 * time.Second
	}
	_ = cmd.Process.Signal(syscall.SIGTERM) // gone already is as good
	select {
	case err := <-ended:
		return err
	case <-time.After(patience):
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its whole group
	return <-ended
}

// Group collects the pieces of one process and stops all when one ends.
type Group struct {
	mu    sync.Mutex
	tasks []func(context.Context) error
}

// Add adds a piece that runs until its context ends.
func (g *Group) Add(name string, f func(context.Context) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tasks = append(g.tasks, func(ctx context.Context) error {
		if err := f(ctx); err != nil && !errors.Is(err, context.Canceled) {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	})
}

// Run runs the pieces until ctx ends or one of them does, and waits for all.
func (g *Group) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, len(g.tasks))
	for _, task := range g.tasks {
		go func() { ended <- task(ctx) }() // waited for below
	}
	var errs []error
	for range g.tasks {
		errs = append(errs, <-ended)
		cancel()
	}
	return errors.Join(errs...)
}
