package api

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/gin-gonic/gin/binding"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/taskqueue/v1"
	"go.temporal.io/sdk/client"

	"github.com/orrery-ml/orrery/api/gateway"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/api/webhook"
	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/workflows"
)

// Config is the configuration of the front door.
type Config struct {
	Open       bool     // dev, bound to loopback: inference and the console need no key
	Hosts      []string // names the server answers to besides loopback; "*" is any
	TemporalUI string   // where the Temporal UI is, for links
	Namespace  string   // of Temporal, for links
	// ContinueAfter is the length of history, in events, at which a roll-out continues as new.
	ContinueAfter int
}

// store is the registry as the front door uses it.
type store interface {
	registry.Catalog
	registry.Versions
	registry.Routes
	registry.Feed
	registry.Fleet
	registry.EvidenceLog
	registry.Runs
	registry.Keys
	registry.Answers
	registry.Webhooks
	Ping(ctx context.Context) error
}

// Server is the front door. It implements the generated StrictServerInterface.
type Server struct {
	config    Config
	store     store
	objects   registry.Objects
	temporal  client.Client
	gateway   *gateway.Gateway
	sender    *webhook.Sender
	authority *authority
	log       *slog.Logger
	told      sync.WaitGroup // messages to workflows that nobody waits for
}

var _ StrictServerInterface = (*Server)(nil)

// Parts are what the front door leads to.
type Parts struct {
	Store    store
	Objects  registry.Objects
	Temporal client.Client
	Gateway  *gateway.Gateway
	Sender   *webhook.Sender
}

// New makes the front door.
func New(c Config, p Parts, log *slog.Logger) *Server {
	return &Server{
		config: c, store: p.Store, objects: p.Objects, temporal: p.Temporal, gateway: p.Gateway, sender: p.Sender, log: log,
		authority: &authority{keys: p.Store, open: c.Open, cache: map[string]cachedKey{}},
	}
}

// maxBody bounds the body of a control request, and maxList one that carries a list; blobs are streamed and have no bound
// but the disk.
const (
	maxBody = 64 << 10
	maxList = 4 << 20
)

// Handler returns everything the server answers over HTTP.
func (s *Server) Handler(metrics *prometheus.Registry) http.Handler {
	gin.SetMode(gin.ReleaseMode)
	binding.EnableDecoderDisallowUnknownFields = true // a misspelt field of a roll-out must not be left out
	engine := gin.New()
	engine.ContextWithFallback = true
	engine.UseRawPath, engine.UnescapePathValues = true, true
	engine.Use(gin.CustomRecoveryWithWriter(nil, recovered(s.log)))
	engine.GET("/metrics", gin.WrapH(promhttp.HandlerFor(metrics, promhttp.HandlerOpts{})))
	engine.GET("/healthz", func(c *gin.Context) { c.String(http.StatusOK, "ok") })

	protocol := gin.WrapH(oip.Handler(s.gateway.Service(), gateway.MaxMessage))
	for _, path := range []string{"/v2", "/v2/*rest"} {
		engine.Any(path, s.authenticate, s.permitInference, protocol)
	}
	s.console(engine)
	control := engine.Group("/api/v1", s.authenticate, limitBody, lingerAfterUpload, s.idempotent)
	RegisterHandlersWithOptions(control, NewStrictHandlerWithOptions(s, []StrictMiddlewareFunc{s.authorize}, StrictGinServerOptions{
		RequestErrorHandlerFunc: s.badRequest, HandlerErrorFunc: s.fail, ResponseErrorHandlerFunc: s.fail,
	}), GinServerOptions{ErrorHandler: func(c *gin.Context, err error, _ int) { s.badRequest(c, err) }})
	engine.NoRoute(func(c *gin.Context) {
		s.fail(c, registry.Errorf(registry.NotFound, "no %s %s here", c.Request.Method, c.Request.URL.Path))
	})
	return engine
}

// isUpload says whether a request carries a body of any size.
func isUpload(c *gin.Context) bool {
	return c.FullPath() == "/api/v1/blobs/:sha256" || c.FullPath() == "/api/v1/objects"
}

// lingerFor is how long a refused upload is still taken in, and thrown away.
const lingerFor = 5 * time.Second

// lingerAfterUpload lets the client of an upload that was refused half-way read why: were the connection closed while it
// sends, all it would see is that.
func lingerAfterUpload(c *gin.Context) {
	if !isUpload(c) || c.Request.Method != http.MethodPut {
		return
	}
	control := http.NewResponseController(c.Writer)
	_ = control.EnableFullDuplex() // HTTP/2 has it anyway
	c.Next()
	if c.Writer.Status() < http.StatusBadRequest {
		return
	}
	_ = control.Flush()                                    // the answer goes out now
	_ = control.SetReadDeadline(time.Now().Add(lingerFor)) // an end to waiting
	_, _ = io.Copy(io.Discard, c.Request.Body)             // until the client has heard, or the deadline
}

// limitBody bounds control requests; uploads of blobs are bounded by their announced size.
func limitBody(c *gin.Context) {
	limit := int64(maxBody)
	switch c.FullPath() {
	case "/api/v1/models/:model/labels", "/api/v1/models/:model/feedback", "/api/v1/models/:model/versions":
		limit = maxList
	}
	if !isUpload(c) {
		c.Request.Body = http.MaxBytesReader(c.Writer, c.Request.Body, limit)
	}
}

// Close waits for messages to workflows that are under way.
func (s *Server) Close() { s.told.Wait() }

// GetStatus implements the API.
func (s *Server) GetStatus(ctx context.Context, _ GetStatusRequestObject) (GetStatusResponseObject, error) {
	position, synced := s.gateway.Position()
	temporal := s.pingTemporal(ctx)
	orchestrator := temporal
	if temporal == nil {
		orchestrator = s.polled(ctx)
	}
	out := GetStatus200JSONResponse{
		Version: version(), Gateway: s.gateway.ID(), Position: position, Synced: synced,
		Registry: health(s.store.Ping(ctx)), Store: health(s.pingStore(ctx)), Temporal: health(temporal),
		Orchestrator: health(orchestrator),
	}
	if s.config.TemporalUI != "" {
		out.TemporalUi = &s.config.TemporalUI
	}
	return out, nil
}

// pollerFresh is how recently somebody polled who still does: a poll lasts a minute.
const pollerFresh = 90 * time.Second

// polled ends in Unavailable when nobody polls for lifecycle workflows and their activities, so that runs do not go on.
func (s *Server) polled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for _, kind := range []enums.TaskQueueType{enums.TASK_QUEUE_TYPE_WORKFLOW, enums.TASK_QUEUE_TYPE_ACTIVITY} {
		queue, err := s.temporal.DescribeTaskQueue(ctx, workflows.LifecycleQueue, kind)
		if err != nil {
			return registry.Errorf(registry.Unavailable, "Temporal does not say who polls %s: %w", workflows.LifecycleQueue, err)
		}
		if !slices.ContainsFunc(queue.GetPollers(), func(p *taskqueue.PollerInfo) bool { return time.Since(p.GetLastAccessTime().AsTime()) < pollerFresh }) {
			return registry.Errorf(registry.Unavailable, "nobody polls %s, so runs wait: is an orchestrator running, and does it reach Temporal?", workflows.LifecycleQueue)
		}
	}
	return nil
}

func health(err error) string {
	if err != nil {
		return err.Error()
	}
	return "ok"
}

func (s *Server) pingStore(ctx context.Context) error {
	_, err := s.objects.Stat(ctx, "ping")
	if registry.CodeOf(err) == registry.NotFound {
		return nil
	}
	return err
}

// merge decodes the fields of raw over the struct at into, refusing unknown ones. A map that raw names is replaced.
func merge(name string, raw *json.RawMessage, into any) error {
	if raw == nil {
		return nil
	}
	var named map[string]json.RawMessage
	if err := json.Unmarshal(*raw, &named); err != nil {
		return registry.Errorf(registry.Invalid, "%s: %w", name, err)
	}
	for field, value := range reflect.ValueOf(into).Elem().Fields() {
		key, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if _, ok := named[key]; ok && value.Kind() == reflect.Map {
			value.SetZero() // the decoder would add to it
		}
	}
	if err := strictJSON(*raw, into); err != nil {
		return registry.Errorf(registry.Invalid, "%s: %w", name, err)
	}
	return nil
}
