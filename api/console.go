package api

import (
	"net/http"
	"slices"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orrery-ml/orrery/registry"
	"github.com/orrery-ml/orrery/web"
)

// console mounts the pages people look at.
func (s *Server) console(engine *gin.Engine) {
	engine.StaticFS("/static", web.Static())
	pages := engine.Group("/", s.authenticate)
	pages.GET("/", s.overview)
	pages.GET("/login", func(c *gin.Context) { s.page(c, http.StatusOK, web.Login(web.LoginView{})) })
	pages.POST("/login", s.login)
}

func (s *Server) page(c *gin.Context, status int, render web.Page) {
	c.Header("Content-Security-Policy", "default-src 'self'; frame-ancestors 'none'")
	c.Status(status)
	c.Header("Content-Type", "text/html; charset=utf-8")
	if err := render(c.Writer); err != nil {
		s.log.Error("render a page", "path", c.FullPath(), "error", err)
	}
}

func (s *Server) login(c *gin.Context) {
	c.Request.Body = http.MaxBytesReader(c.Writer, c.Request.Body, 10_000)
	secret := c.PostForm("key")
	if _, err := s.authority.lookup(c.Request.Context(), secret); err != nil {
		s.page(c, http.StatusUnauthorized, web.Login(web.LoginView{Fault: "That key is not known."}))
		return
	}
	http.SetCookie(c.Writer, &http.Cookie{ //nolint:gosec // Secure follows the connection: loopback has no TLS
		Name: keyCookie, Value: secret, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: c.Request.TLS != nil,
		MaxAge: int((12 * time.Hour).Seconds()),
	})
	c.Redirect(http.StatusSeeOther, "/")
}

func (s *Server) overview(c *gin.Context) {
	ctx := c.Request.Context()
	if err := permit(caller(ctx), registry.Viewer, ""); err != nil {
		c.Redirect(http.StatusSeeOther, "/login")
		return
	}
	snap, err := s.store.Snapshot(ctx)
	if err != nil {
		s.fail(c, err)
		return
	}
	workers, err := s.store.Leases(ctx, registry.WorkerLease, time.Now())
	if err != nil {
		s.fail(c, err)
		return
	}
	runs, err := s.store.ListRuns(ctx, registry.RunFilter{Limit: 30})
	if err != nil {
		s.fail(c, err)
		return
	}
	view := web.OverviewView{TemporalUI: s.config.TemporalUI, Workers: workers}
	for _, m := range snap.Models {
		if !caller(ctx).Covers(m.Name) {
			continue
		}
		row := web.ModelRow{Name: m.Name, Description: m.Description}
		if i := slices.IndexFunc(snap.Routes, func(r registry.Route) bool { return r.Model == m.Name }); i >= 0 {
			row.Route = snap.Routes[i]
		}
		view.Models = append(view.Models, row)
	}
	for _, r := range runs {
		if caller(ctx).Covers(r.Model) {
			view.Runs = append(view.Runs, web.RunRow{Run: r, TemporalURL: value(s.runDTO(r).TemporalUrl)})
		}
	}
	s.page(c, http.StatusOK, web.Overview(view))
}
