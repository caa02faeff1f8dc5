// The page of the API: Swagger's viewer over this server's own document.
if (window.SwaggerUIBundle) {
  window.SwaggerUIBundle({
    url: "openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
  });
} else {
  document.getElementById("swagger-ui").textContent =
    "The viewer is not installed on this server; openapi.json describes the API.";
}
