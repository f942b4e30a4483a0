package api

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gin-gonic/gin"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/orrery-ml/orrery/api/gateway"
	"github.com/orrery-ml/orrery/api/proto/attach"
	"github.com/orrery-ml/orrery/api/proto/inference"
	"github.com/orrery-ml/orrery/api/proto/oip"
	"github.com/orrery-ml/orrery/registry"
)

// keyCookie carries the API key of a browser that logged in to the console.
const keyCookie = "orrery_key"

// needs is the role each operation needs; an operation that is missing needs Admin.
var needs = map[string]registry.KeyRole{
	"GetStatus": registry.Viewer, "ListModels": registry.Viewer, "GetModel": registry.Viewer, "ListVersions": registry.Viewer,
	"GetVersion": registry.Viewer, "GetRoute": registry.Viewer, "ListRoutes": registry.Viewer, "ListAliases": registry.Viewer,
	"ListAliasMoves": registry.Viewer, "ListRuns": registry.Viewer, "GetRun": registry.Viewer, "ListEvidence": registry.Viewer,
	"ListLeases": registry.Viewer, "ListEvents": registry.Viewer,
	"GetObject": registry.Viewer, "ListSchedules": registry.Viewer, "AddLabels": registry.Predictor,
	"PutObject": registry.Developer, "StartBatch": registry.Developer, "StartDriftCheck": registry.Developer,
	"CreateSchedule": registry.Deployer, "DeleteSchedule": registry.Deployer, "TriggerSchedule": registry.Deployer,
	"TriggerRetrain": registry.Deployer,
	"HeadBlob":       registry.Developer, "PutBlob": registry.Developer, "CreateModel": registry.Developer, "RegisterVersion": registry.Developer,
	"ConfigureModel": registry.Deployer, "ArchiveVersion": registry.Deployer, "SetRoute": registry.Deployer, "Rollback": registry.Deployer,
	"SetAlias": registry.Deployer, "DeleteAlias": registry.Deployer, "StartRollout": registry.Deployer, "DecideRun": registry.Viewer, // the handler looks at the action
	"AddFeedback": registry.Predictor,
}

// NewSecret returns a random API key: "ok_" and 26 characters of base32, 130 bits.
func NewSecret() string { return "ok_" + rand.Text() }

// HashSecret returns what is stored of an API key.
func HashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// authority looks API keys up and remembers them for a few seconds, so that inference goes on while the registry is
// away: a key that was good stays good until the registry answers again.
type authority struct {
	keys registry.Keys
	open bool // dev: loopback inference and the console need no key

	mu    sync.Mutex
	cache map[string]cachedKey
}

type cachedKey struct {
	key registry.APIKey
	at  time.Time
}

const (
	keyFresh = 5 * time.Second
	maxKeys  = 10_000 // remembered
)

func (a *authority) lookup(ctx context.Context, secret string) (registry.APIKey, error) {
	hash := HashSecret(secret)
	a.mu.Lock()
	known, ok := a.cache[hash]
	a.mu.Unlock()
	if ok && time.Since(known.at) < keyFresh {
		return known.key, nil
	}
	key, err := a.keys.KeyByHash(ctx, hash)
	if err != nil {
		if ok && registry.CodeOf(err) != registry.Unauthenticated {
			return known.key, nil
		}
		return key, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.cache) >= maxKeys {
		clear(a.cache)
	}
	a.cache[hash] = cachedKey{key, time.Now()}
	return key, nil
}

// secretOf returns the key a request brings: a bearer token, or the console's cookie.
func secretOf(r *http.Request) string {
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return token
	}
	if c, err := r.Cookie(keyCookie); err == nil {
		return c.Value
	}
	return ""
}

// anonymous is who calls without a key where none is needed.
var anonymous = registry.APIKey{Name: "local", Role: registry.Predictor}

type callerKey struct{}

func caller(ctx context.Context) registry.APIKey {
	k, _ := ctx.Value(callerKey{}).(registry.APIKey)
	return k
}

// actor names who makes a request, for the record.
func actor(ctx context.Context) string { return caller(ctx).Name }

// authenticate puts the caller into the request's context. Without a key the request goes on only where none is
// needed; the operation's role is checked later.
func (s *Server) authenticate(c *gin.Context) {
	if err := checkOrigin(c.Request, s.config.Hosts); err != nil {
		s.fail(c, err)
		return
	}
	key := registry.APIKey{}
	if secret := secretOf(c.Request); secret != "" {
		var err error
		if key, err = s.authority.lookup(c.Request.Context(), secret); err != nil {
			s.fail(c, err)
			return
		}
	} else if s.authority.open {
		key = anonymous
	}
	ctx := context.WithValue(c.Request.Context(), callerKey{}, key)
	c.Request = c.Request.WithContext(gateway.WithCaller(ctx, key.Name, key.Covers))
}

// checkOrigin refuses requests by other sites (Origin) and by rebound names (Host).
func checkOrigin(r *http.Request, hosts []string) error {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if !loopbackName(host) && !slices.Contains(hosts, host) && !slices.Contains(hosts, "*") {
		return registry.Errorf(registry.Denied, "host %q is not one of this server's names: add it to ORRERY_HOSTS", host)
	}
	origin := r.Header.Get("Origin")
	if origin == "" || r.Method == http.MethodGet || r.Method == http.MethodHead {
		return nil
	}
	if u, err := url.Parse(origin); err != nil || u.Host != r.Host {
		return registry.Errorf(registry.Denied, "requests from %q are not allowed", origin)
	}
	return nil
}

func loopbackName(host string) bool {
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || (ip != nil && ip.IsLoopback())
}

// authorize lets an operation through when the caller's role and models allow it.
func (s *Server) authorize(f StrictHandlerFunc, operation string) StrictHandlerFunc {
	return func(c *gin.Context, request any) (any, error) {
		need, ok := needs[operation]
		if !ok {
			need = registry.Admin
		}
		key := caller(c.Request.Context())
		if err := permit(key, need, c.Param("model")); err != nil {
			return nil, err
		}
		return f(c, request)
	}
}

func permit(key registry.APIKey, need registry.KeyRole, model string) error {
	switch {
	case key.Name == "":
		return registry.Errorf(registry.Unauthenticated, "this needs an API key: send it as a bearer token (orrery --key, ORRERY_KEY)")
	case !key.Role.Allows(need):
		return registry.Errorf(registry.Denied, "key %q is a %s; this needs a %s", key.Name, key.Role, need)
	case model != "" && !key.Covers(strings.SplitN(model, "@", 2)[0]):
		return registry.Errorf(registry.Denied, "key %q may not touch model %q", key.Name, model)
	}
	return nil
}

// permitInference guards the protocol's REST surface.
func (s *Server) permitInference(c *gin.Context) {
	path := strings.TrimPrefix(c.Request.URL.Path, "/v2")
	if path == "" || path == "/" || strings.HasPrefix(path, "/health/") {
		return
	}
	need, model := registry.Predictor, ""
	if rest, ok := strings.CutPrefix(path, "/models/"); ok {
		model = strings.SplitN(rest, "/", 2)[0]
	}
	if rest, ok := strings.CutPrefix(path, "/repository/models/"); ok {
		need, model = registry.Deployer, strings.SplitN(rest, "/", 2)[0]
	}
	if err := permit(caller(c.Request.Context()), need, model); err != nil {
		code, _ := oip.HTTPStatus(oip.Status(string(registry.CodeOf(err)), err, 0))
		c.AbortWithStatusJSON(code, gin.H{"error": err.Error()})
	}
}

// UnaryAuth guards the protocol's gRPC surface.
func (s *Server) UnaryAuth(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	key, err := s.grpcKey(ctx)
	if err == nil {
		err = permitGRPC(key, request)
	}
	if err != nil {
		return nil, oip.Status(string(registry.CodeOf(err)), err, 0)
	}
	return handler(withCaller(ctx, key), request)
}

func withCaller(ctx context.Context, key registry.APIKey) context.Context {
	return gateway.WithCaller(context.WithValue(ctx, callerKey{}, key), key.Name, key.Covers)
}

// grpcKey returns the key a call carries.
func (s *Server) grpcKey(ctx context.Context) (registry.APIKey, error) {
	key := registry.APIKey{}
	if s.authority.open {
		key = anonymous
	}
	for _, v := range metadata.ValueFromIncomingContext(ctx, "authorization") {
		found, err := s.authority.lookup(ctx, strings.TrimPrefix(v, "Bearer "))
		if err != nil {
			return key, err
		}
		key = found
	}
	return key, nil
}

func permitGRPC(key registry.APIKey, request any) error {
	need, model, free := grpcNeeds(request)
	if free {
		return nil
	}
	if r, ok := request.(*inference.ModelStatisticsRequest); ok && r.GetName() == "" && len(key.Models) > 0 {
		return registry.Errorf(registry.Denied, "key %q may touch some models only: name one of them", key.Name)
	}
	return permit(key, need, model)
}

// StreamAuth guards the protocol's streams: every request of a stream is checked as if it had come alone. Workers attach
// with a token of their own.
func (s *Server) StreamAuth(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if info.FullMethod == attach.AttachService_Attach_FullMethodName {
		return handler(service, stream)
	}
	key, err := s.grpcKey(stream.Context())
	if err != nil {
		return oip.Status(string(registry.CodeOf(err)), err, 0)
	}
	return handler(service, &guardedStream{ServerStream: stream, key: key, ctx: withCaller(stream.Context(), key)})
}

// guardedStream checks what it receives.
type guardedStream struct {
	grpc.ServerStream

	key registry.APIKey
	ctx context.Context //nolint:containedctx // of the stream
}

func (g *guardedStream) Context() context.Context { return g.ctx }

func (g *guardedStream) RecvMsg(m any) error {
	if err := g.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if err := permitGRPC(g.key, m); err != nil {
		return oip.Status(string(registry.CodeOf(err)), err, 0)
	}
	return nil
}

// grpcNeeds says what a request of the protocol needs; liveness and readiness are free.
func grpcNeeds(request any) (need registry.KeyRole, model string, free bool) {
	switch r := request.(type) {
	case *inference.ServerLiveRequest, *inference.ServerReadyRequest, *inference.ServerMetadataRequest, *healthpb.HealthCheckRequest:
		return registry.Viewer, "", true
	case *inference.ModelInferRequest:
		return registry.Predictor, r.GetModelName(), false
	case *inference.RepositoryModelLoadRequest:
		return registry.Deployer, r.GetModelName(), false
	case *inference.RepositoryModelUnloadRequest:
		return registry.Deployer, r.GetModelName(), false
	case interface{ GetName() string }:
		return registry.Predictor, r.GetName(), false
	}
	return registry.Predictor, "", false
}
