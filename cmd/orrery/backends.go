package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/pflag"
	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/sdk/client"
	tlog "go.temporal.io/sdk/log"

	"github.com/orrery-ml/orrery/engine"
	"github.com/orrery-ml/orrery/engine/onnx"
	"github.com/orrery-ml/orrery/internal/toolpath"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/registry/artifact"
	"github.com/orrery-ml/orrery/registry/store"
)

// backends are the addresses of what the roles stand on.
type backends struct {
	registry  string
	store     string
	access    string
	secret    string
	temporal  string
	namespace string
	ort       string
	logLevel  string
}

func (b *backends) flags(p *program, f *pflag.FlagSet, which ...string) {
	wanted := map[string]func(){
		"registry": func() {
			f.StringVar(&b.registry, "registry", "", "registry database: sqlite:PATH or postgres://… (ORRERY_REGISTRY)")
		},
		"store": func() {
			f.StringVar(&b.store, "store", "", "object store: dir:PATH or s3://bucket/prefix?endpoint=host:port&tls=false (ORRERY_STORE)")
		},
		"temporal": func() {
			f.StringVar(&b.temporal, "temporal", "127.0.0.1:7233", "Temporal's address (ORRERY_TEMPORAL)")
			f.StringVar(&b.namespace, "namespace", "default", "Temporal namespace (ORRERY_NAMESPACE)")
		},
	}
	for _, w := range which {
		wanted[w]()
	}
	f.StringVar(&b.logLevel, "log-level", "info", "debug, info, warn or error (ORRERY_LOG_LEVEL)")
	b.access, b.secret, b.ort = p.getenv("ORRERY_STORE_ACCESS_KEY"), p.getenv("ORRERY_STORE_SECRET_KEY"), p.getenv("ORRERY_ONNXRUNTIME_LIB")
}

// environment maps flags to variables.
var environment = map[string]string{
	"registry": "ORRERY_REGISTRY", "store": "ORRERY_STORE", "temporal": "ORRERY_TEMPORAL", "namespace": "ORRERY_NAMESPACE",
	"log-level": "ORRERY_LOG_LEVEL", "http": "ORRERY_HTTP", "grpc": "ORRERY_GRPC", "node": "ORRERY_NODE",
	"state-dir": "ORRERY_STATE_DIR", "hosts": "ORRERY_HOSTS", "temporal-ui": "ORRERY_TEMPORAL_UI", "servers": "ORRERY_SERVERS",
	"advertise": "ORRERY_ADVERTISE", "cache-dir": "ORRERY_CACHE_DIR", "config": "ORRERY_CONFIG", "deployment": "ORRERY_DEPLOYMENT", "continue-after": "ORRERY_CONTINUE_AFTER", "threads": "ORRERY_THREADS", "memory-budget": "ORRERY_MEMORY_BUDGET",
}

func (p *program) fromEnvironment(f *pflag.FlagSet) error {
	known := map[string]string{}
	f.VisitAll(func(flag *pflag.Flag) {
		if v, ok := environment[flag.Name]; ok {
			known[flag.Name] = v
		}
	})
	return p.envFlags(f, known)
}

func (b *backends) openRegistry(ctx context.Context, log *slog.Logger) (*store.Store, error) {
	if b.registry == "" {
		return nil, &exitError{exitUsage, errors.New("--registry (ORRERY_REGISTRY) is missing: sqlite:PATH or postgres://…")}
	}
	return store.OpenAnyway(ctx, b.registry, log)
}

// openStore opens the object store. One that is away for the moment is used when it comes back.
func (b *backends) openStore(ctx context.Context, log *slog.Logger) (registry.Objects, error) {
	if b.store == "" {
		return nil, &exitError{exitUsage, errors.New("--store (ORRERY_STORE) is missing: dir:PATH or s3://bucket?endpoint=host:port")}
	}
	objects, err := artifact.Open(ctx, b.store, b.access, b.secret)
	if registry.CodeOf(err) == registry.Unavailable {
		log.Warn("the object store is away; going on without it", "error", err)
		return artifact.OpenLater(b.store, b.access, b.secret)
	}
	return objects, err
}

func (b *backends) openTemporal(log *slog.Logger) (client.Client, error) {
	c, err := client.NewLazyClient(client.Options{HostPort: b.temporal, Namespace: b.namespace, Logger: tlog.NewStructuredLogger(log)})
	if err != nil {
		return nil, fmt.Errorf("temporal client: %w", err)
	}
	return c, nil
}

// ensureSearchAttributes registers Orrery's search attributes in the namespace, and waits until Temporal answers.
func ensureSearchAttributes(ctx context.Context, c client.Client, namespace string, log *slog.Logger) error {
	wanted := map[string]enums.IndexedValueType{
		"OrreryModel": enums.INDEXED_VALUE_TYPE_KEYWORD, "OrreryVersion": enums.INDEXED_VALUE_TYPE_INT,
		"OrreryKind": enums.INDEXED_VALUE_TYPE_KEYWORD, "OrreryActor": enums.INDEXED_VALUE_TYPE_KEYWORD,
		"OrreryRun": enums.INDEXED_VALUE_TYPE_KEYWORD,
	}
	for attempt := 0; ; attempt++ {
		err := addMissing(ctx, c, namespace, wanted)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if attempt%20 == 0 {
			log.Info("waiting for Temporal", "error", err)
		}
		if err := pause(ctx, 250*time.Millisecond); err != nil {
			return err
		}
	}
}

// pause waits, or ends early with ctx.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func addMissing(ctx context.Context, c client.Client, namespace string, wanted map[string]enums.IndexedValueType) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	have, err := c.OperatorService().ListSearchAttributes(ctx, &operatorservice.ListSearchAttributesRequest{Namespace: namespace})
	if err != nil {
		return err
	}
	missing := map[string]enums.IndexedValueType{}
	for name, kind := range wanted {
		if _, ok := have.GetCustomAttributes()[name]; !ok {
			missing[name] = kind
		}
	}
	if len(missing) == 0 {
		return nil
	}
	_, err = c.OperatorService().AddSearchAttributes(ctx, &operatorservice.AddSearchAttributesRequest{Namespace: namespace, SearchAttributes: missing})
	return err
}

func (b *backends) startOnnx() (engine.Runtime, error) {
	library, err := toolpath.OnnxRuntime(b.ort)
	if err != nil {
		return nil, err
	}
	return onnx.Start(library)
}
