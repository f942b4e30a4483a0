// The overview is rendered by the server; this fetches it again every two seconds while the page is looked at.
"use strict";
setInterval(async () => {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(next.querySelector("main"));
  } catch { /* the server is away: keep what is shown */ }
}, 2000);
