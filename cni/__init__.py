"""The CNI plugin: capture at pod creation, chained behind any primary plugin. Rules are `interceptor`'s business."""
